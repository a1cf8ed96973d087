/* Errors.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int qlb_fail(struct qlb_error *err, enum qlb_code code, const char *fmt, ...)
{
    va_list ap;

    err->code = code;
    va_start(ap, fmt);
    vsnprintf(err->message, sizeof(err->message), fmt, ap);
    va_end(ap);
    return -1;
}

int qlb_fail_errno(struct qlb_error *err, int errnum, const char *fmt, ...)
{
    va_list ap;
    char reason[128];
    const char *text = strerror_r(errnum, reason, sizeof(reason));
    size_t used;

    err->code = QLB_E_RUNTIME;
    va_start(ap, fmt);
    vsnprintf(err->message, sizeof(err->message), fmt, ap);
    va_end(ap);
    used = strlen(err->message);
    snprintf(err->message + used, sizeof(err->message) - used, ": %s", text);
    return -1;
}

int qlb_error_prefix(struct qlb_error *err, const char *fmt, ...)
{
    va_list ap;
    char rest[sizeof(err->message)];
    size_t used;

    memcpy(rest, err->message, sizeof(rest));
    va_start(ap, fmt);
    vsnprintf(err->message, sizeof(err->message), fmt, ap);
    va_end(ap);
    used = strlen(err->message);
    /* A name may fill the buffer: the end of the old message is cut off. */
    snprintf(err->message + used, sizeof(err->message) - used, ": %.900s",
             rest);
    return -1;
}
