/* What a live restore has begun in a folder, so that it can go on
 * (docs/recovery.md, "A machine that boots from its backup").
 *
 * In FOLDER/.lbvm-live are "state.json", which tells of which backup the disks
 * are, and for disk N the socket "N" that its overlay names as its backing
 * file. Who serves has the folder locked.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_LIVE_FOLDER_H
#define VM_LIVE_FOLDER_H

#include "tool.h"

struct live_folder;

/* That of a folder, locked. begun: something was begun there. Where not, and it
 * is not to be made, *live is NULL after success. QLB_E_BUSY: another lbvm
 * serves it. */
int live_folder_open(const char *folder, bool make, struct live_folder **live,
                     struct qlb_error *err);
void live_folder_close(struct live_folder *live); /* NULL is allowed */

/* What was begun; NULL: nothing. disks: their names, in the order of their
 * numbers; the folder's. */
const char *live_folder_path(const struct live_folder *live);
const char *live_folder_machine(const struct live_folder *live);
const char *live_folder_id(const struct live_folder *live);
char **live_folder_disks(const struct live_folder *live, unsigned *n);
/* All disks were made then: one that is not there is lost. */
bool live_folder_is_ready(const struct live_folder *live);

/* Notes it, synced. ready: all that it tells of is there. */
int live_folder_note(struct live_folder *live, const char *machine,
                     const char *id, const char *const *disks, unsigned n,
                     bool ready, struct qlb_error *err);

/* The socket of disk N, absolute; NULL where memory is short. */
char *live_folder_socket(const struct live_folder *live, unsigned n);

/* Forgets it: all is done, or nothing was begun. */
int live_folder_remove(struct live_folder *live, struct qlb_error *err);

/* ---- the disks ---- */

enum live_disk_state {
    LIVE_DISK_ABSENT,
    LIVE_DISK_UNFINISHED, /* an overlay over what is served at the socket */
    LIVE_DISK_WHOLE,      /* it has no backing file any more */
};

/* An overlay, synced, under that name, which is free; what the guest changes is
 * tracked since the chain's checkpoint. It has no content, but reads as zeroes
 * by itself where the chain has nothing for long. */
int live_disk_make(const char *path, const char *socket,
                   struct qlb_chain *chain, struct qlb_error *err);

/* As its header says, also while QEMU has it open. QLB_E_RUNTIME: it is
 * something else. */
int live_disk_look(const char *path, const char *socket,
                   enum live_disk_state *state, struct qlb_error *err);

/* Whether nothing of the first `size` bytes is the backing file's any more, by
 * what is in the file: QEMU may have the rest in its caches; and syncs that.
 * offset: the first byte that is, else. */
int live_disk_prove(const char *path, uint64_t size, bool *whole,
                    uint64_t *offset, struct qlb_error *err);

#endif
