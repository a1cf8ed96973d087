/* JSON objects of a repository.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/stored_json.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

json_t *stored_json_parse(const struct store_text *text, const char *path,
                          struct qlb_error *err)
{
    json_error_t reason;
    json_t *json = json_loadb(text->data, text->len, JSON_REJECT_DUPLICATES,
                              &reason);

    if (json == NULL) {
        qlb_fail(err, QLB_E_DAMAGED, "%s: is no JSON: line %d: %.200s", path,
                 reason.line, reason.text);
    }
    return json;
}

int stored_json_get(struct store *store, const char *object, json_t **json,
                    struct qlb_error *err)
{
    char *path = store_path(store, object);
    struct store_text text;
    int ret = path == NULL ? qlb_fail_errno(err, ENOMEM, "%s", store->name)
                           : store_get(store, object, &text, err);

    if (ret > 0) {
        *json = stored_json_parse(&text, path, err);
        ret = *json == NULL ? -1 : 1;
        free(text.data);
    }
    free(path);
    return ret;
}

int stored_json_put(struct store *store, const char *object,
                    const json_t *json, bool replace, struct qlb_error *err)
{
    char *text = json_dumps(json, JSON_INDENT(2) | JSON_PRESERVE_ORDER);
    size_t len;
    int ret;

    if (text == NULL) {
        return qlb_fail_errno(err, ENOMEM, "%s", store->name);
    }
    len = strlen(text);
    text[len] = '\n'; /* in the place of the zero byte */
    ret = store_put(store, object, text, len + 1, replace, err);
    free(text);
    return ret;
}
