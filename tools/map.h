/* What has changed since a checkpoint, for other programs.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef MAP_H
#define MAP_H

#include "imagedump.h"

/* Prints the map as JSON to standard output. Of the disk: path and request
 * (DUMP_INCREMENTAL or DUMP_SINCE). Changes nothing in the image. */
int map_print(struct imagedump *disk, struct qlb_error *err);

#endif
