/* What the tools share.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "tool.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

volatile bool tool_stop;
static const char *program = "lb";
static const char *help_command = "lb"; /* the program, or its command */

/* ---- messages ---- */

/* The path of an image may hold anything: a control character must not reach
 * the operator's terminal. */
static void print_line(const char *text)
{
    fprintf(stderr, "%s: ", program);
    for (const char *p = text; *p != '\0'; p++) {
        unsigned char c = (unsigned char)*p;

        if (c < 32 || c == 127) {
            fprintf(stderr, "\\x%02x", c);
        } else {
            fputc(c, stderr);
        }
    }
    fputc('\n', stderr);
}

void tool_message(const char *fmt, ...)
{
    char text[2048];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    print_line(text);
}

void tool_usage(const char *fmt, ...)
{
    char text[2048];
    va_list ap;

    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    print_line(text);
    fprintf(stderr, "Try '%s --help'.\n", help_command);
    exit(QLB_E_USAGE);
}

bool tool_names(const struct qlb_error *err, const char *path)
{
    size_t len = path == NULL ? 0 : strlen(path);

    return len > 0 && strncmp(err->message, path, len) == 0 &&
           err->message[len] == ':';
}

int tool_fail(const char *path, const struct qlb_error *err)
{
    if (path == NULL || path[0] == '\0' || tool_names(err, path)) {
        print_line(err->message);
    } else {
        tool_message("%s: %s", path, err->message);
    }
    return err->code;
}

int tool_flush_stdout(void)
{
    if (fflush(stdout) != 0) {
        tool_message("standard output: %s", strerror(errno));
        return QLB_E_RUNTIME;
    }
    return 0;
}

/* ---- options ---- */

static void print_help(const struct tool *tool)
{
    printf("Usage: %s %s\n\n%s\n\nOptions:\n", tool->name, tool->synopsis,
           tool->summary);
    for (const struct tool_option *o = tool->options; o->name != NULL; o++) {
        char left[64];
        bool brief = o->value > ' ' && o->value < 127;

        snprintf(left, sizeof(left), "%c%c%s--%s%s%s", brief ? '-' : ' ',
                 brief ? o->value : ' ', brief ? ", " : "  ", o->name,
                 o->argument == NULL ? "" : "=",
                 o->argument == NULL ? "" : o->argument);
        printf("  %-28s %s\n", left, o->help);
    }
    printf("\nManual: man %s\n", program);
}

static void build_getopt(const struct tool *tool, struct option *longs,
                         char *shorts)
{
    unsigned n = 0;

    *shorts++ = ':';
    for (const struct tool_option *o = tool->options; o->name != NULL; o++) {
        longs[n++] = (struct option) {
            .name = o->name,
            .has_arg = o->argument == NULL ? no_argument : required_argument,
            .val = o->value,
        };
        if (o->value > ' ' && o->value < 127) {
            *shorts++ = (char)o->value;
            if (o->argument != NULL) {
                *shorts++ = ':';
            }
        }
    }
    *shorts = '\0';
    memset(&longs[n], 0, sizeof(longs[n]));
}

int tool_getopt(const struct tool *tool, int argc, char **argv)
{
    enum { MAX_OPTIONS = 64 };
    struct option longs[MAX_OPTIONS];
    char shorts[2 * MAX_OPTIONS + 2];
    int value;

    help_command = tool->name;
    build_getopt(tool, longs, shorts);
    opterr = 0;
    value = getopt_long(argc, argv, shorts, longs, NULL);
    switch (value) {
    case TOOL_OPT_HELP:
        print_help(tool);
        exit(tool_flush_stdout());
    case TOOL_OPT_VERSION:
        printf("%s (qcow2 livebackup) %s\n", program, qlb_version());
        exit(tool_flush_stdout());
    case ':':
        tool_usage("option '%s' wants an argument", argv[optind - 1]);
    case '?':
        if (optopt >= TOOL_OPT_LONG && strchr(argv[optind - 1], '=')) {
            tool_usage("option '%s' takes no argument", argv[optind - 1]);
        }
        if (optopt > ' ' && optopt < 127) {
            tool_usage("unknown option '-%c'", optopt);
        }
        tool_usage("unknown or ambiguous option '%s'", argv[optind - 1]);
    default:
        return value;
    }
}

uint64_t tool_parse_size(const char *text, const char *what)
{
    static const char units[] = "KMGT";
    const char *unit;
    char *end;
    unsigned long long value;
    unsigned shift = 0;

    errno = 0;
    value = strtoull(text, &end, 10);
    if (*end != '\0' && (unit = strchr(units, *end)) != NULL) {
        shift = 10 * (unsigned)(unit - units + 1);
        end++;
    }
    if (end == text || *end != '\0' || errno != 0 || *text == '-' ||
        value > UINT64_MAX >> shift) {
        tool_usage("%s: '%s' is no size (as 65536, 64K, 10M, 2G)", what,
                   text);
    }
    return (uint64_t)value << shift;
}

unsigned tool_parse_number(const char *text, const char *what, unsigned low,
                           unsigned high)
{
    char *end;
    unsigned long value;

    errno = 0;
    value = strtoul(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || *text == '-' ||
        value < low || value > high) {
        tool_usage("%s: '%s' is no number from %u to %u", what, text, low,
                   high);
    }
    return (unsigned)value;
}

struct qlb_uuid tool_parse_uuid(const char *text, const char *what)
{
    struct qlb_uuid uuid;

    if (!qlb_uuid_parse(text, &uuid)) {
        tool_usage("%s: '%s' is no UUID", what, text);
    }
    return uuid;
}

const char *tool_parse_label(const char *text, const char *what)
{
    if (!qlb_label_valid(text)) {
        tool_usage("%s: '%s' is no label: 1 to %u of the characters A-Z a-z "
                   "0-9 . _ -", what, text, QLB_LABEL_MAX);
    }
    return text;
}

enum qlb_digest_type tool_parse_digest(const char *text, const char *what)
{
    if (strcmp(text, "xxh3") == 0) {
        return QLB_DIGEST_XXH3_128;
    }
    if (strcmp(text, "sha256") == 0) {
        return QLB_DIGEST_SHA256;
    }
    tool_usage("%s: '%s' is neither xxh3 nor sha256", what, text);
}

/* ---- signals ---- */

static void on_signal(int number)
{
    if (tool_stop) {
        qlb_outfile_abandon_all();
        signal(number, SIG_DFL);
        raise(number);
    }
    tool_stop = true;
}

/* A standard descriptor that is closed would be given to the next file that
 * is opened, and the archive, or a message, be written into the image. Opened
 * the wrong way round, so that using it fails. */
static void occupy_standard_descriptors(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        int flags = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY;

        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", flags) != fd) {
            exit(QLB_E_RUNTIME);
        }
    }
}

void tool_begin(const char *name)
{
    struct sigaction stop = { .sa_handler = on_signal };
    struct sigaction ignore = { .sa_handler = SIG_IGN };

    occupy_standard_descriptors();
    program = help_command = name;
    sigaction(SIGINT, &stop, NULL);
    sigaction(SIGTERM, &stop, NULL);
    sigaction(SIGHUP, &stop, NULL);
    sigaction(SIGPIPE, &ignore, NULL);
    sigaction(SIGXFSZ, &ignore, NULL);
}

/* ---- formatting ---- */

char *tool_format_size(uint64_t bytes, char *text)
{
    static const char *const units[] = { "KiB", "MiB", "GiB", "TiB", "PiB",
                                         "EiB" };
    double value = (double)bytes / 1024;
    unsigned i = 0;

    if (bytes < 1024) {
        sprintf(text, "%u B", (unsigned)bytes);
        return text;
    }
    while (value >= 1023.95 && i < 5) {
        value /= 1024;
        i++;
    }
    sprintf(text, "%.1f %s", value, units[i]);
    return text;
}

char *tool_format_time(uint64_t seconds, char *text)
{
    time_t t = (time_t)seconds;
    struct tm tm;

    if (gmtime_r(&t, &tm) == NULL ||
        strftime(text, 32, "%Y-%m-%dT%H:%M:%SZ", &tm) == 0) {
        snprintf(text, 32, "@%" PRIu64, seconds);
    }
    return text;
}

struct qlb_uuid tool_random_uuid(void)
{
    struct qlb_uuid uuid;

    if (getrandom(uuid.bytes, sizeof(uuid.bytes), 0) !=
        sizeof(uuid.bytes)) {
        tool_message("no random numbers: %s", strerror(errno));
        exit(QLB_E_RUNTIME);
    }
    uuid.bytes[6] = (uint8_t)((uuid.bytes[6] & 0x0f) | 0x40);
    uuid.bytes[8] = (uint8_t)((uuid.bytes[8] & 0x3f) | 0x80);
    return uuid;
}

double tool_clock(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

unsigned tool_default_threads(void)
{
    cpu_set_t set;
    int n = 1;

    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        n = CPU_COUNT(&set);
    }
    return n < 1 ? 1 : n > 8 ? 8 : (unsigned)n;
}

/* ---- JSON ---- */

json_t *tool_json_uuid(const struct qlb_uuid *uuid)
{
    char text[QLB_UUID_TEXT];

    if (qlb_uuid_is_zero(uuid)) {
        return json_null();
    }
    return json_string(qlb_uuid_format(uuid, text));
}

json_t *tool_json_hex(const uint8_t *bytes, size_t len)
{
    char text[2 * QLB_DIGEST_MAX + 1];

    qlb_hex(bytes, len, text);
    return json_string(text);
}

int tool_print_json(json_t *object, bool to_stderr)
{
    FILE *file = to_stderr ? stderr : stdout;
    int ret = json_dumpf(object, file, JSON_INDENT(2) | JSON_PRESERVE_ORDER);

    json_decref(object);
    if (ret < 0 || fputc('\n', file) == EOF || fflush(file) != 0) {
        tool_message("writing the summary: %s", strerror(errno));
        return -1;
    }
    return 0;
}

struct qlb_outfile *tool_open_stdout(struct qlb_error *err)
{
    struct stat st;

    if (fstat(STDOUT_FILENO, &st) == 0 && S_ISREG(st.st_mode) &&
        (st.st_size > 0 || lseek(STDOUT_FILENO, 0, SEEK_CUR) > 0)) {
        qlb_fail(err, QLB_E_USAGE, "standard output: the file is not empty, "
                 "and an archive can't be appended to it");
        return NULL;
    }
    return qlb_outfile_fd(STDOUT_FILENO, "standard output", err);
}

void tool_discard_stdout(const struct qlb_outfile *out)
{
    if (out == NULL || !qlb_outfile_is_regular(out) ||
        qlb_outfile_is_committed(out)) {
        return;
    }
    if (lseek(STDOUT_FILENO, 0, SEEK_CUR) ==
            (off_t)qlb_outfile_position(out) &&
        ftruncate(STDOUT_FILENO, 0) < 0) {
        tool_message("standard output: %s", strerror(errno));
    }
}

/* ---- progress ---- */

void tool_progress_begin(struct tool_progress *progress, const char *verb,
                         enum tool_progress_mode mode, uint64_t total)
{
    *progress = (struct tool_progress) {
        .shown = mode == PROGRESS_ON ||
                 (mode == PROGRESS_AUTO && isatty(STDERR_FILENO)),
        .verb = verb,
        .total = total,
        .start = tool_clock(),
    };
}

static int format_time_left(double seconds, char *text, size_t size)
{
    unsigned s = seconds > 359999 ? 359999 : (unsigned)seconds;

    return snprintf(text, size, ", %u:%02u:%02u left", s / 3600,
                    s / 60 % 60, s % 60);
}

static void print_progress(struct tool_progress *progress, uint64_t bytes,
                           double now)
{
    double elapsed = now - progress->start;
    double rate = elapsed > 0 ? (double)bytes / elapsed : 0;
    char done[16], per_second[16], share[16] = "", left[40] = "";
    int width;

    tool_format_size(bytes, done);
    tool_format_size((uint64_t)rate, per_second);
    if (progress->total > 0) {
        snprintf(share, sizeof(share), " (%u %%)",
                 (unsigned)(100.0 * (double)bytes / (double)progress->total));
        if (rate > 0 && bytes <= progress->total) {
            format_time_left((double)(progress->total - bytes) / rate, left,
                             sizeof(left));
        }
    }
    width = fprintf(stderr, "\r%s: %s %s%s, %s/s%s", program, progress->verb,
                    done, share, per_second, left);
    for (int i = width; i < (int)progress->width; i++) {
        fputc(' ', stderr);
    }
    fflush(stderr);
    progress->width = width > 0 ? (unsigned)width : 0;
}

void tool_progress_update(struct tool_progress *progress, uint64_t bytes)
{
    double now;

    if (!progress->shown) {
        return;
    }
    now = tool_clock();
    if (now - progress->last >= 0.5) {
        progress->last = now;
        print_progress(progress, bytes, now);
    }
}

void tool_progress_end(struct tool_progress *progress)
{
    if (progress->shown && progress->width > 0) {
        fputc('\n', stderr);
    }
}

/* ---- rate limit ---- */

void tool_rate_account(struct tool_rate *rate, uint64_t bytes)
{
    double due, now;

    if (rate->bytes_per_second == 0) {
        return;
    }
    now = tool_clock();
    if (rate->sent == 0) {
        rate->start = now;
    }
    rate->sent += bytes;
    due = rate->start + (double)rate->sent / (double)rate->bytes_per_second;
    while (due > now && !tool_stop) {
        double wait = due - now > 0.2 ? 0.2 : due - now;
        struct timespec pause = { .tv_nsec = (long)(wait * 1e9) };

        nanosleep(&pause, NULL);
        now = tool_clock();
    }
}
