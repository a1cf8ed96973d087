/* Where the objects of a repository are (docs/repository.md): a folder here, or
 * one on another host that is reached by ssh. Whole objects are written, read,
 * listed and deleted; nothing relies on a rename.
 *
 * An object is named by its path below the store, "vm1/backups/ID.json"; ""
 * is the store itself. Errors begin with where it is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_STORE_H
#define VM_STORE_H

#include "tool.h"

/* Names, in a growing array. */
struct store_names {
    char **at;
    unsigned n;
};

int store_names_add(struct store_names *names, const char *name);
void store_names_sort(struct store_names *names);
/* In sorted ones. */
bool store_names_have(const struct store_names *names, const char *name);
void store_names_release(struct store_names *names);

/* An object is read whole where it is no archive: at most so many bytes. */
#define STORE_MAX_SMALL (UINT64_C(64) << 20)

/* What is read whole; a zero byte follows. */
struct store_text {
    char *data;
    size_t len;
};

struct store_lock;

/* Called for each; an error ends it. */
typedef int store_each_fn(void *opaque, const char *name,
                          const struct store_text *text,
                          struct qlb_error *err);

struct store;

struct store_ops {
    /* One that is there already is as good. */
    int (*make_folder)(struct store *store, const char *folder, bool own,
                       struct qlb_error *err);
    int (*list)(struct store *store, const char *folder,
                struct store_names *names, struct qlb_error *err);
    int (*each)(struct store *store, const char *folder, const char *suffix,
                store_each_fn *each, void *opaque, struct qlb_error *err);
    int (*has)(struct store *store, const char *object,
               struct qlb_error *err);
    int (*get)(struct store *store, const char *object,
               struct store_text *text, struct qlb_error *err);
    int (*put)(struct store *store, const char *object, const char *data,
               size_t len, bool replace, struct qlb_error *err);
    int (*touch)(struct store *store, const char *object,
                 struct qlb_error *err);
    struct qlb_outfile *(*create)(struct store *store, const char *object,
                                  struct qlb_error *err);
    int (*delete)(struct store *store, const char *const *objects,
                  unsigned n, struct qlb_error *err);
    char *(*fetch)(struct store *store, const char *object,
                   struct qlb_error *err);
    int (*lock)(struct store *store, const char *object, bool exclusive,
                const char *who, struct store_lock **lock,
                struct qlb_error *err);
    void (*unlock)(struct store *store, struct store_lock *lock);
    void (*close)(struct store *store);
};

/* For implementations: the beginning of their own. */
struct store {
    const struct store_ops *ops;
    char *name;          /* for messages: the path, or the URL */
};

/* Whether the location is a URL of another host. */
bool store_is_remote(const char *location);

/* A path, or ssh://[USER@]HOST[:PORT]/PATH. A folder is not looked at yet;
 * another host is connected with. NULL on failure. */
struct store *store_open(const char *location, struct qlb_error *err);
void store_close(struct store *store); /* NULL is allowed; not its locks */

/* For messages, and in a folder where it is; the caller frees it. NULL where
 * memory is short. */
char *store_path(const struct store *store, const char *object);

/* Makes a folder and has it last. own: nobody else may look into it. */
int store_make_folder(struct store *store, const char *folder, bool own,
                      struct qlb_error *err);
/* All names in a folder, ascending; none where it fails. */
int store_list(struct store *store, const char *folder,
               struct store_names *names, struct qlb_error *err);
/* Small objects of a folder whose names end so and begin with no dot, in any
 * order. One that is deleted meanwhile is left out. */
int store_each(struct store *store, const char *folder, const char *suffix,
               store_each_fn *each, void *opaque, struct qlb_error *err);
/* 1, 0, -1. */
int store_has(struct store *store, const char *object,
              struct qlb_error *err);
/* Reads a small object: 1, 0 where it does not exist, -1. */
int store_get(struct store *store, const char *object,
              struct store_text *text, struct qlb_error *err);
/* Writes a small object whole, synced. Without replace, one that exists is
 * an error. */
int store_put(struct store *store, const char *object, const void *data,
              size_t len, bool replace, struct qlb_error *err);
/* Makes an empty object; one that exists stays as it is, and who holds a lock on
 * it. */
int store_touch(struct store *store, const char *object,
                struct qlb_error *err);
/* Begins a new archive; from any thread. path: store_path of its name. */
struct qlb_outfile *store_create(void *store, const char *path,
                                 struct qlb_error *err);
/* One that does not exist is as good; a folder is left alone. */
int store_delete(struct store *store, const char *object,
                 struct qlb_error *err);
/* The same for several of one folder. */
int store_delete_all(struct store *store, const char *const *objects,
                     unsigned n, struct qlb_error *err);
/* A path under which an archive can be read until the store is closed; for
 * the caller to free. */
char *store_fetch(struct store *store, const char *object,
                  struct qlb_error *err);

/* At once, or QLB_E_BUSY: who is in the way. shared: where there is no file to
 * be locked and none can be made, *lock is NULL after success. */
int store_lock(struct store *store, const char *object, bool exclusive,
               const char *who, struct store_lock **lock,
               struct qlb_error *err);
void store_unlock(struct store *store, struct store_lock *lock);

/* For implementations. */
struct store *store_folder_open(const char *path, struct qlb_error *err);
struct store *store_ssh_open(const char *url, struct qlb_error *err);
/* What a killed process leaves of an object that it wrote: ".NAME.XXXXXX.tmp",
 * and "." and "..". */
bool store_is_temporary(const char *name);

#endif
