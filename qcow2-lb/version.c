/*
 * The version of the library
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */

#include "qcow2lb.h"

const char *qlb_version(void)
{
    return PACKAGE_VERSION;
}
