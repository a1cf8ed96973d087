/* What monitoring is told, in a file for Prometheus' text file collector.
 *
 * The old file is input like any other: somebody else may own its folder. Only
 * lines are kept that we could have written, in the form in which we write
 * them; a link is never followed, but replaced.
 *
 * The lock is that of the folder, so that no further file lies among those that
 * the collector reads. It is held for an instant; who can't have it for long
 * goes on without: a value that another process lost comes back with its next
 * run.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "vm/metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FILE = 1 << 20, MAX_SAMPLES = 4000, LOCK_TRIES = 100 };

enum label { MACHINE, REPOSITORY, COMMAND, DISK, N_LABELS };

static const char *const label_names[] = {
    "machine", "repository", "command", "disk",
};

enum family_id {
    LAST_SUCCESS, LAST_ATTEMPT, LAST_STATUS, BYTES, DURATION, CHAIN_LENGTH,
    LAST_VERIFIED, N_FAMILIES,
};

enum { OF_MACHINE = 1 << MACHINE | 1 << REPOSITORY,
       OF_COMMAND = OF_MACHINE | 1 << COMMAND,
       OF_DISK = OF_MACHINE | 1 << DISK };

static const struct family {
    const char *name;
    unsigned labels;
    const char *help;
} families[] = {
    [LAST_SUCCESS] = { "lbvm_last_success_timestamp_seconds", OF_COMMAND,
                       "When the command last succeeded." },
    [LAST_ATTEMPT] = { "lbvm_last_attempt_timestamp_seconds", OF_COMMAND,
                       "When the command last ended." },
    [LAST_STATUS] = { "lbvm_last_status", OF_COMMAND,
                      "Exit status of the last attempt." },
    [BYTES] = { "lbvm_backup_bytes", OF_DISK,
                "Size of the disk's archive in the newest backup." },
    [DURATION] = { "lbvm_backup_duration_seconds", OF_MACHINE,
                   "How long the last successful backup took." },
    [CHAIN_LENGTH] = { "lbvm_chain_length", OF_DISK,
                       "Archives that a restore of the newest backup reads." },
    [LAST_VERIFIED] = { "lbvm_last_verified_timestamp_seconds", OF_MACHINE,
                        "When lbvm verify last found all good that it read." },
};

static const char *const command_names[] = {
    [METRICS_BACKUP] = "backup",
    [METRICS_VERIFY] = "verify",
    [METRICS_PRUNE] = "prune",
};

struct sample {
    enum family_id family;
    char *labels[N_LABELS]; /* NULL: it has none of that name */
    double value;
    bool dropped;
};

struct samples {
    struct sample *list;
    unsigned n;
    bool failed; /* memory is short */
};

/* ---- samples ---- */

static void release_sample(struct sample *sample)
{
    for (unsigned i = 0; i < N_LABELS; i++) {
        free(sample->labels[i]);
    }
}

static void release_samples(struct samples *samples)
{
    for (unsigned i = 0; i < samples->n; i++) {
        release_sample(&samples->list[i]);
    }
    free(samples->list);
}

static int compare_texts(const char *a, const char *b)
{
    return a == NULL || b == NULL ? (a != NULL) - (b != NULL) : strcmp(a, b);
}

static int compare_samples(const void *a, const void *b)
{
    const struct sample *x = a, *y = b;
    int order = (int)x->family - (int)y->family;

    for (unsigned i = 0; order == 0 && i < N_LABELS; i++) {
        order = compare_texts(x->labels[i], y->labels[i]);
    }
    return order;
}

/* Its labels become those of the list; one that is there is replaced. */
static void put_sample(struct samples *samples, struct sample *sample)
{
    struct sample *larger;

    for (unsigned i = 0; i < samples->n; i++) {
        if (compare_samples(&samples->list[i], sample) == 0) {
            release_sample(&samples->list[i]);
            samples->list[i] = *sample;
            return;
        }
    }
    larger = realloc(samples->list, (samples->n + 1) * sizeof(*larger));
    if (larger == NULL) {
        release_sample(sample);
        samples->failed = true;
        return;
    }
    samples->list = larger;
    larger[samples->n++] = *sample;
}

/* The bytes of the UTF-8 character there; 0: it is none, or a control
 * character, which has no place in a label. */
static unsigned character_length(const char *text)
{
    const unsigned char *c = (const unsigned char *)text;
    unsigned n = c[0] < 0x80 ? 1 : c[0] < 0xe0 ? 2 : c[0] < 0xf0 ? 3 : 4;
    uint32_t value = n == 1 ? c[0] : c[0] & (0x7fu >> n);
    static const uint32_t smallest[] = { 0, 0, 0x80, 0x800, 0x10000 };

    if (c[0] < ' ' || c[0] == 0x7f || (c[0] >= 0x80 && c[0] < 0xc2) ||
        c[0] > 0xf4) {
        return 0;
    }
    for (unsigned i = 1; i < n; i++) {
        if ((c[i] & 0xc0) != 0x80) {
            return 0;
        }
        value = value << 6 | (c[i] & 0x3f);
    }
    return value < smallest[n] || value > 0x10ffff ||
                   (value >= 0xd800 && value < 0xe000)
               ? 0 : n;
}

/* With '?' for what can't be in a label. */
static char *label_value(const char *text)
{
    char *copy = strdup(text);

    for (char *c = copy; copy != NULL && *c != '\0';) {
        unsigned n = *c == '\n' ? 1 : character_length(c);

        if (n == 0) {
            *c = '?';
            n = 1;
        }
        c += n;
    }
    return copy;
}

/* ---- the old file ---- */

/* A label's value behind the opening quote; moves behind the closing one. */
static char *take_value(const char **at)
{
    const char *c = *at;
    char *value = malloc(strlen(c) + 1), *to = value;

    while (value != NULL && *c != '"') {
        unsigned n;

        if (*c == '\\') {
            if (c[1] != '\\' && c[1] != '"' && c[1] != 'n') {
                break;
            }
            *to++ = c[1] == 'n' ? '\n' : c[1];
            c += 2;
            continue;
        }
        n = character_length(c); /* 0 at the end of the line */
        if (n == 0) {
            break;
        }
        memcpy(to, c, n);
        to += n;
        c += n;
    }
    if (value == NULL || *c != '"') {
        free(value);
        return NULL;
    }
    *to = '\0';
    *at = c + 1;
    return value;
}

/* NAME="VALUE" */
static bool take_label(const char **at, struct sample *sample)
{
    for (unsigned i = 0; i < N_LABELS; i++) {
        size_t len = strlen(label_names[i]);

        if (strncmp(*at, label_names[i], len) != 0 || (*at)[len] != '=' ||
            (*at)[len + 1] != '"') {
            continue;
        }
        if (sample->labels[i] != NULL) {
            return false;
        }
        *at += len + 2;
        sample->labels[i] = take_value(at);
        return sample->labels[i] != NULL;
    }
    return false;
}

static bool take_labels(const char **at, struct sample *sample)
{
    unsigned mask = 0;

    do {
        ++*at; /* '{' or ',' */
        if (!take_label(at, sample)) {
            return false;
        }
    } while (**at == ',');
    if (**at != '}') {
        return false;
    }
    ++*at;
    for (unsigned i = 0; i < N_LABELS; i++) {
        mask |= sample->labels[i] != NULL ? 1u << i : 0;
    }
    return mask == families[sample->family].labels;
}

/* A line that we could have written. */
static bool parse_sample(const char *line, struct sample *sample)
{
    const char *brace = strchr(line, '{');
    size_t len = brace == NULL ? 0 : (size_t)(brace - line);
    unsigned family = 0;
    char *end;

    while (family < N_FAMILIES && (strlen(families[family].name) != len ||
                                   memcmp(families[family].name, line,
                                          len) != 0)) {
        family++;
    }
    if (family == N_FAMILIES) {
        return false;
    }
    sample->family = (enum family_id)family;
    line = brace;
    if (!take_labels(&line, sample) || line[0] != ' ' || line[1] < '0' ||
        line[1] > '9') {
        return false;
    }
    sample->value = strtod(line + 1, &end);
    return *end == '\0' && isfinite(sample->value);
}

static void parse_file(struct samples *samples, char *text, size_t len)
{
    char *line = text, *end = text + len;

    while (line < end && samples->n < MAX_SAMPLES && !samples->failed) {
        char *newline = memchr(line, '\n', (size_t)(end - line));
        struct sample sample = { 0 };

        if (newline == NULL) {
            return; /* torn */
        }
        *newline = '\0';
        if (strlen(line) == (size_t)(newline - line) &&
            parse_sample(line, &sample)) {
            put_sample(samples, &sample);
        } else {
            release_sample(&sample);
        }
        line = newline + 1;
    }
}

/* Where it can't be read it has nothing. */
static void read_file(const char *path, struct samples *samples)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    char *text = malloc(MAX_FILE);
    struct stat st;
    size_t len = 0;
    ssize_t n = -1;

    if (fd >= 0 && text != NULL && fstat(fd, &st) == 0 &&
        S_ISREG(st.st_mode) && st.st_size <= MAX_FILE) {
        while (len < MAX_FILE &&
               (n = read(fd, text + len, MAX_FILE - len)) > 0) {
            len += (size_t)n;
        }
        if (n >= 0) {
            parse_file(samples, text, len);
        }
    }
    if (fd >= 0) {
        close(fd);
    }
    free(text);
}

/* ---- what is told now ---- */

static void tell(struct samples *samples, const struct metrics *m,
                 enum family_id family, const char *disk, double value)
{
    const char *const texts[N_LABELS] = {
        m->machine, m->repository, command_names[m->command], disk,
    };
    struct sample sample = { .family = family, .value = value };

    for (unsigned i = 0; i < N_LABELS; i++) {
        if (families[family].labels & 1u << i) {
            sample.labels[i] = label_value(texts[i]);
            samples->failed |= sample.labels[i] == NULL;
        }
    }
    if (samples->failed) {
        release_sample(&sample);
    } else {
        put_sample(samples, &sample);
    }
}

/* Disks that the machine has no longer are gone. */
static void drop_disks(struct samples *samples, const struct metrics *m,
                       enum family_id family)
{
    char *machine = label_value(m->machine);
    char *repository = label_value(m->repository);

    for (unsigned i = 0; i < samples->n; i++) {
        struct sample *sample = &samples->list[i];

        sample->dropped |= machine != NULL && repository != NULL &&
            sample->family == family &&
            strcmp(sample->labels[MACHINE], machine) == 0 &&
            strcmp(sample->labels[REPOSITORY], repository) == 0;
    }
    samples->failed |= machine == NULL || repository == NULL;
    free(machine);
    free(repository);
}

static void tell_disks(struct samples *samples, const struct metrics *m)
{
    drop_disks(samples, m, CHAIN_LENGTH);
    drop_disks(samples, m, BYTES);
    for (unsigned i = 0; i < m->n_disks; i++) {
        const struct metrics_disk *disk = &m->disks[i];

        tell(samples, m, BYTES, disk->name, (double)disk->bytes);
        tell(samples, m, CHAIN_LENGTH, disk->name, disk->chain_length);
    }
}

static void tell_all(struct samples *samples, const struct metrics *m)
{
    double now = (double)m->time;

    tell(samples, m, LAST_ATTEMPT, NULL, now);
    tell(samples, m, LAST_STATUS, NULL, m->status);
    if (m->status != 0) {
        return;
    }
    tell(samples, m, LAST_SUCCESS, NULL, now);
    if (m->command == METRICS_BACKUP) {
        tell(samples, m, DURATION, NULL, m->seconds);
    }
    if (m->command == METRICS_VERIFY) {
        tell(samples, m, LAST_VERIFIED, NULL, now);
    }
    if (m->n_disks > 0) {
        tell_disks(samples, m);
    }
}

/* ---- the new file ---- */

static void print_label(FILE *file, const char *name, const char *value,
                        bool first)
{
    fprintf(file, "%s%s=\"", first ? "{" : ",", name);
    for (const char *c = value; *c != '\0'; c++) {
        if (*c == '\n') {
            fputs("\\n", file);
        } else {
            fprintf(file, *c == '"' || *c == '\\' ? "\\%c" : "%c", *c);
        }
    }
    fputc('"', file);
}

static void print_samples(FILE *file, const struct samples *samples)
{
    const struct sample *before = NULL;

    for (unsigned i = 0; i < samples->n; i++) {
        const struct sample *sample = &samples->list[i];
        const struct family *family = &families[sample->family];
        bool first = true;

        if (sample->dropped) {
            continue;
        }
        if (before == NULL || before->family != sample->family) {
            fprintf(file, "# HELP %s %s\n# TYPE %s gauge\n", family->name,
                    family->help, family->name);
        }
        before = sample;
        fputs(family->name, file);
        for (unsigned k = 0; k < N_LABELS; k++) {
            if (sample->labels[k] != NULL) {
                print_label(file, label_names[k], sample->labels[k], first);
                first = false;
            }
        }
        fprintf(file, "} %.15g\n", sample->value);
    }
}

static int print_file(int fd, const struct samples *samples)
{
    FILE *file = fdopen(fd, "w");
    bool good;

    if (file == NULL) {
        close(fd);
        return -1;
    }
    print_samples(file, samples);
    good = fflush(file) == 0 && !ferror(file) && fchmod(fd, 0644) == 0 &&
           fsync(fd) == 0;
    return fclose(file) == 0 && good ? 0 : -1;
}

/* The length of the path's folder with its slash, 0 for the present one. */
static int folder_length(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash == NULL ? 0 : (int)(slash - path + 1);
}

/* The mode is that of a file that everybody may read, whatever the umask. A
 * rename replaces a link, and does not follow it. */
static int write_file(const char *path, const struct samples *samples,
                      struct qlb_error *err)
{
    int folder = folder_length(path);
    char *temporary;
    int fd, ret = 0;

    if (asprintf(&temporary, "%.*s.%.200s.XXXXXX.tmp", folder, path,
                 path + folder) < 0) {
        return qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    fd = mkostemps(temporary, 4, O_CLOEXEC);
    if (fd < 0) {
        ret = qlb_fail_errno(err, errno, "%s", path);
    } else if (print_file(fd, samples) < 0 || rename(temporary, path) < 0) {
        ret = qlb_fail_errno(err, errno, "%s: writing", path);
        unlink(temporary);
    }
    free(temporary);
    return ret;
}

/* Of the folder; -1: none. */
static int lock_folder(const char *path)
{
    const struct timespec pause = { .tv_nsec = 20000000 };
    char *folder = strndup(path, (size_t)folder_length(path));
    int fd = folder == NULL ? -1 : open(*folder == '\0' ? "." : folder,
                                        O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    for (unsigned i = 0; fd >= 0 && i < LOCK_TRIES &&
         flock(fd, LOCK_EX | LOCK_NB) < 0; i++) {
        nanosleep(&pause, NULL);
    }
    free(folder);
    return fd;
}

int metrics_write(const char *path, const struct metrics *metrics,
                  struct qlb_error *err)
{
    struct samples samples = { 0 };
    int lock = lock_folder(path), ret;

    read_file(path, &samples);
    tell_all(&samples, metrics);
    if (samples.failed) {
        ret = qlb_fail_errno(err, ENOMEM, "%s", path);
    } else {
        qsort(samples.list, samples.n, sizeof(*samples.list),
              compare_samples);
        ret = write_file(path, &samples, err);
    }
    if (lock >= 0) {
        close(lock);
    }
    release_samples(&samples);
    return ret;
}
