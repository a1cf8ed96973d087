/* A disk of a backup as a file that can be read at once: FOLDER/NAME.img, which
 * nbdfuse shows, of what nbdkit and our plugin serve. What these have to say,
 * damage in an archive above all, is in FOLDER/NAME.log.
 *
 * The log is made first, then an empty file, then it is mounted upon, and taken
 * away the other way round: whatever is killed when, a file that is not empty is
 * one that is mounted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_BACKUP_FILE_H
#define VM_BACKUP_FILE_H

#include <sys/types.h>

#include "tool.h"

/* Shows what the chain ends with. The chain may be closed then. name: without
 * slashes. writable: what is written is kept until it is taken away, in a file
 * without a name in $TMPDIR or /var/tmp. pid: of nbdfuse, which is in a session
 * of its own, may be NULL. */
int backup_file_mount(const char *folder, const char *name,
                      const struct qlb_chain *chain, bool writable,
                      pid_t *pid, struct qlb_error *err);

/* Takes the file away, and its log: 1; 0: there is none; -1, with QLB_E_BUSY
 * where somebody reads it. Of the name, ".img" is not part. */
int backup_file_unmount(const char *folder, const char *name,
                        struct qlb_error *err);

/* "FOLDER/NAME.img", for the caller to free; NULL. */
char *backup_file_path(const char *folder, const char *name,
                       struct qlb_error *err);
/* The last thing that was said in the log, without a newline; "" where nothing
 * was. */
void backup_file_last_word(const char *folder, const char *name, char *text,
                           size_t size);

#endif
