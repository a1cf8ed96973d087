/*
 * qcow2 livebackup: the public header of libqcow2lb and libqcow2lb-core
 *
 * #include <qcow2-lb/qcow2lb.h>; it brings in all the others, each of which
 * documents what it declares. libqcow2lb-core, which QEMU links, has what
 * bitmap.h, bitmap_ext.h, cbw.h, orig.h and uuid.h declare, and qlb_version().
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QCOW2LB_H
#define QCOW2LB_H

#ifdef __cplusplus
extern "C" {
#endif

/* Core: no I/O. */
#include "bitmap.h"
#include "bitmap_ext.h"
#include "cbw.h"
#include "orig.h"
#include "uuid.h"

/* Files, digests, threads. */
#include "blkio.h"
#include "digest.h"
#include "error.h"
#include "outfile.h"
#include "pipeline.h"

/* Disks and images. */
#include "image.h"
#include "live.h"
#include "qcow2_header.h"
#include "qcow2_map.h"
#include "qcow2_patch.h"
#include "qcow2_writer.h"

/* Archives. */
#include "chain.h"
#include "lbz_reader.h"
#include "lbz_writer.h"

/*
 * The version of the library that is linked, as "0.1.0". Static storage; never
 * NULL.
 */
const char *qlb_version(void);

#ifdef __cplusplus
}
#endif

#endif /* QCOW2LB_H */
