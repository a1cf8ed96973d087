/* Restoring a disk from a chain of archives, of lbrestore and lbvm.
 *
 * Order of calls: new; take_chain or open_stdin; open_output; run; commit;
 * free. After a failure only free may follow.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef RESTORE_CHAIN_H
#define RESTORE_CHAIN_H

#include <pthread.h>

#include "tool.h"

enum restore_format { RESTORE_BY_NAME, RESTORE_QCOW2, RESTORE_RAW };

/* How much has been restored, by several restores at once. */
struct restore_meter {
    pthread_mutex_t lock;
    struct tool_rate rate;
    struct tool_progress progress;
    uint64_t bytes;
    bool abandoned; /* under the lock: one has failed, the others end */
};

/* expected: bytes, for the progress; 0 if not known. */
void restore_meter_begin(struct restore_meter *meter,
                         const struct tool_rate *rate,
                         enum tool_progress_mode mode, uint64_t expected);
void restore_meter_end(struct restore_meter *meter);
/* Those were restored. An error where the others are to end. */
int restore_meter_account(struct restore_meter *meter, uint64_t bytes,
                          struct qlb_error *err);

struct restore_options {
    const char *output;  /* a file, or a block device */
    enum restore_format format;
    bool force;          /* replace it where it exists */
    unsigned threads;
};

struct restore;

/* The options' strings must outlive it. NULL where memory is short. */
struct restore *restore_new(const struct restore_options *options,
                            struct qlb_error *err);
void restore_free(struct restore *restore); /* NULL is allowed */

/* The chain, which begins with a full archive, becomes the restore's. */
void restore_take_chain(struct restore *restore, struct qlb_chain *chain);
/* A full archive from standard input. at: its UUID, or NULL for any. */
int restore_open_stdin(struct restore *restore, const struct qlb_uuid *at,
                       struct qlb_error *err);

/* Nothing appears under its name yet; a block device is written in place. */
int restore_open_output(struct restore *restore, struct qlb_error *err);
/* All of the disk; what is needed for that alone is released at its end. */
int restore_run(struct restore *restore, struct restore_meter *meter,
                struct qlb_error *err);
/* The output is synced and gets its name. */
int restore_commit(struct restore *restore, struct qlb_error *err);

/* From the opened input on. */
const struct qlb_lbz_header *restore_header(const struct restore *restore);
/* From the opened output on: which of the two it is. */
enum restore_format restore_format(const struct restore *restore);
uint64_t restore_bytes(const struct restore *restore);

/* "qcow2" or "raw", else a usage error. */
enum restore_format restore_parse_format(const char *text);
const char *restore_format_name(enum restore_format format);

#endif
