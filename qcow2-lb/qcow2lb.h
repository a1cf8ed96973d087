/*
 * qcow2 livebackup: the public header of libqcow2lb and libqcow2lb-core
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QCOW2LB_H
#define QCOW2LB_H

#ifdef __cplusplus
extern "C" {
#endif

/*
 * The version of the library that is linked, as "0.1.0". Static storage; never
 * NULL.
 */
const char *qlb_version(void);

#ifdef __cplusplus
}
#endif

#endif /* QCOW2LB_H */
