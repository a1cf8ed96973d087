/* JSON objects of a repository.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef VM_STORED_JSON_H
#define VM_STORED_JSON_H

#include "vm/store.h"

/* path: where it is, for messages. NULL: QLB_E_DAMAGED. */
json_t *stored_json_parse(const struct store_text *text, const char *path,
                          struct qlb_error *err);
/* 1; 0 where there is no such object; -1. */
int stored_json_get(struct store *store, const char *object, json_t **json,
                    struct qlb_error *err);
/* Without replace, one that exists is an error. */
int stored_json_put(struct store *store, const char *object,
                    const json_t *json, bool replace, struct qlb_error *err);

#endif
