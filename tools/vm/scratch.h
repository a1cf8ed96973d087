/* The scratch folder of one backup: locked as long as its owner lives, and with
 * a note of what the next one is to take back, should the owner die.
 *
 * The user who runs QEMU owns the folder, and is not trusted: nothing in it is
 * followed, and only what lbvm makes there is deleted.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_SCRATCH_H
#define VM_SCRATCH_H

#include "tool.h"

enum { SCRATCH_KEY = 8 }; /* hexadecimal digits */

struct scratch;

/* Makes PARENT/.lbvm-KEY, with a random key. image: whose owner may use the
 * folder. note: of what is about to be made. NULL on failure. */
struct scratch *scratch_make(const char *parent, const char *image,
                             const json_t *note, struct qlb_error *err);
/* Takes over a folder whose owner is dead; NULL: there is none of that path, or
 * (alive) its owner lives. */
struct scratch *scratch_take_over(const char *path, bool *alive);
/* Takes over each one in the parent whose owner is dead; NULL: no more. dir:
 * from opendir(). */
struct scratch *scratch_next_dead(const char *parent, void *dir);

const char *scratch_key(const struct scratch *scratch);
const char *scratch_path(const struct scratch *scratch);
/* What its owner has noted, for the caller to release; NULL: nothing that can
 * be read. */
json_t *scratch_note(const struct scratch *scratch);

/* An empty file for QEMU to open; and without its name, so that its space is
 * free again as soon as QEMU lets go of it, in whatever way. */
int scratch_add_file(const struct scratch *scratch, const char *name,
                     struct qlb_error *err);
void scratch_unlink(const struct scratch *scratch, const char *name);
/* Whether somebody listens on the socket of that name. */
bool scratch_has_server(const struct scratch *scratch, const char *name);

/* Lets go of it; remove: deletes it. NULL is allowed. */
void scratch_free(struct scratch *scratch, bool remove);

#endif
