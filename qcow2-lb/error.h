/* Errors: what the library reports instead of printing.
 *
 * A function that can fail takes a `struct qlb_error *` as its last argument
 * and returns -1 (or NULL) after filling it; the caller's object needs no
 * initialisation and no release.  The code is the exit status that a tool
 * reports (design: "Tools"); the message is one line, without the program's
 * name and without a final newline.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#ifndef QLB_ERROR_H
#define QLB_ERROR_H

enum qlb_code {
    QLB_OK = 0,
    QLB_E_RUNTIME = 1,   /* I/O, space, memory, or a format we can't read */
    QLB_E_USAGE = 2,     /* what was asked makes no sense */
    QLB_E_UNTRUSTED = 3, /* no trusted way to do what was asked */
    QLB_E_DAMAGED = 4,   /* data is damaged */
    QLB_E_BUSY = 5,      /* the image is in use by another process */
};

struct qlb_error {
    enum qlb_code code;
    char message[1024];
};

/* Sets the error; returns -1, so that `return qlb_fail(...)` reads well. */
int qlb_fail(struct qlb_error *err, enum qlb_code code, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* The same with code QLB_E_RUNTIME and ": strerror(errnum)" appended. */
int qlb_fail_errno(struct qlb_error *err, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Puts "what: " before the message of an error that is set; returns -1. */
int qlb_error_prefix(struct qlb_error *err, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
