/* What the tools share: options, messages, exit statuses, progress, signals.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef TOOL_H
#define TOOL_H

#include <getopt.h>
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "qcow2lb.h"

/* One option: its long name, the character getopt returns for it, the name of
 * its argument (NULL: none), and a line of help. */
struct tool_option {
    const char *name;
    int value;
    const char *argument;
    const char *help;
};

/* A program, or a subcommand of one. Ends with an option without name. */
struct tool {
    const char *name;     /* as messages begin */
    const char *synopsis; /* behind the name; several lines are allowed */
    const char *summary;  /* one sentence */
    const struct tool_option *options;
};

/* Values of options that have no short form begin here; those that all tools
 * have are handled by tool_getopt. */
enum { TOOL_OPT_LONG = 256, TOOL_OPT_HELP = 0x1000, TOOL_OPT_VERSION };

#define TOOL_COMMON_OPTIONS                                                  \
    { "help", TOOL_OPT_HELP, NULL, "show this help and exit" },              \
    { "version", TOOL_OPT_VERSION, NULL, "show the version and exit" },      \
    { NULL, 0, NULL, NULL }

/* getopt_long over the tool's options: the option's value, -1 at the end.
 * Exits for --help, --version, and with status 2 for what is wrong. An option
 * whose value is a printable character is also a short option. */
int tool_getopt(const struct tool *tool, int argc, char **argv);

/* Prints "NAME: message" (one line) to standard error. */
void tool_message(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

/* Prints a usage error with a pointer to --help; exits with status 2. */
_Noreturn void tool_usage(const char *fmt, ...)
    __attribute__((format(printf, 1, 2)));

/* Whether the message begins with that path (which may be NULL). */
bool tool_names(const struct qlb_error *err, const char *path);

/* Prints the error, with the path before it unless it already begins with
 * it (path may be NULL). Returns the exit status. */
int tool_fail(const char *path, const struct qlb_error *err);

/* What was printed has arrived: 0, or a message and QLB_E_RUNTIME. */
int tool_flush_stdout(void);

/* Sets signal handling and the name of messages. SIGINT, SIGTERM and SIGHUP
 * set tool_stop; a second one removes temporary files and ends the process.
 * SIGPIPE and SIGXFSZ become errors of write(). */
void tool_begin(const char *name);
extern volatile bool tool_stop;

/* "4096", "64K", "1M", "2G", "1T" (binary units): bytes. Usage error else. */
uint64_t tool_parse_size(const char *text, const char *what);
/* A decimal number in a range. Usage error else. */
unsigned tool_parse_number(const char *text, const char *what, unsigned low,
                           unsigned high);
struct qlb_uuid tool_parse_uuid(const char *text, const char *what);
/* A chain label; "xxh3" or "sha256". Usage error else. */
const char *tool_parse_label(const char *text, const char *what);
enum qlb_digest_type tool_parse_digest(const char *text, const char *what);

/* "12.3 MiB" into text (at least 16 bytes), which is returned. */
char *tool_format_size(uint64_t bytes, char *text);
/* "2026-11-22T20:15:00Z" into text (at least 32 bytes). */
char *tool_format_time(uint64_t seconds, char *text);

/* A fresh UUID (version 4); exits where the kernel has no random numbers. */
struct qlb_uuid tool_random_uuid(void);

/* Seconds of a clock that never goes back. */
double tool_clock(void);

/* Number of threads when none is asked for: the processors we may use, at
 * most 8. */
unsigned tool_default_threads(void);

json_t *tool_json_uuid(const struct qlb_uuid *uuid); /* null where zero */
json_t *tool_json_hex(const uint8_t *bytes, size_t len);
/* Prints and releases the object: to standard output, or where that carries
 * an archive, to standard error. 0, or -1 where that fails. */
int tool_print_json(json_t *object, bool to_stderr);

/* Standard output, for an archive. A regular file must be empty: offsets in an
 * archive count from its first byte, and nothing may follow its last, so one
 * that is appended to something (>>), or overwrites its start (1<>), is none.
 * NULL on failure. */
struct qlb_outfile *tool_open_stdout(struct qlb_error *err);

/* After a failure: empties the file that standard output was redirected to,
 * so that it does not look like the start of an archive. What was committed is
 * left alone. out may be NULL: nothing was opened. */
void tool_discard_stdout(const struct qlb_outfile *out);

/* ---- progress ---- */

/* A line on standard error, rewritten twice a second: bytes, share, rate,
 * time left. Not thread-safe. */
struct tool_progress {
    bool shown;
    const char *verb;
    uint64_t total; /* 0: not known */
    double start, last;
    unsigned width; /* of the last line */
};

enum tool_progress_mode { PROGRESS_AUTO, PROGRESS_ON, PROGRESS_OFF };

/* AUTO: where standard error is a terminal. */
void tool_progress_begin(struct tool_progress *progress, const char *verb,
                         enum tool_progress_mode mode, uint64_t total);
void tool_progress_update(struct tool_progress *progress, uint64_t bytes);
void tool_progress_end(struct tool_progress *progress);

/* ---- rate limit ---- */

struct tool_rate {
    uint64_t bytes_per_second; /* 0: no limit */
    double start;
    uint64_t sent;
};

/* Counts bytes and sleeps where they came too fast. */
void tool_rate_account(struct tool_rate *rate, uint64_t bytes);

#endif
