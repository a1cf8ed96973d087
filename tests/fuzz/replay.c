/*
 * Runs a libFuzzer entry point without libFuzzer, as a test
 *
 * First every file of its corpus, tests/fuzz/corpus/NAME, then inputs that are
 * made from those: bytes and words replaced, ranges cut, repeated or spliced
 * from another file. It ends after RUNS inputs or SECONDS, whichever comes
 * first; both are multiplied by 30 if QLB_NIGHTLY is set. The sequence depends
 * on the seed alone (QLB_FUZZ_SEED), which is printed.
 *
 * The entry point ends the process when it finds something: the input is then
 * still in the file that is named first, and `NAME FILE...` runs just those.
 *
 * Copyright (C) 2026 The qcow2 livebackup authors
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define LARGEST (4u << 20)
#define MAX_FILES 4096
#define RUNS 50000
#define SECONDS 6

struct input {
    uint8_t *data;
    size_t size;
};

static struct input corpus[MAX_FILES];
static size_t n_corpus;

/*
 * The input that is running, in a file that is mapped shared: what the kernel
 * has, a crash of this process does not lose.
 */
static uint8_t *current;
static int current_fd = -1;
static char current_name[PATH_MAX];

static void die(const char *what)
{
    printf("Bail out! ");
    fflush(stdout);
    perror(what);
    exit(1);
}

static uint64_t state;

/* splitmix64: any seed will do, 0 too */
static uint64_t draw(uint64_t below)
{
    uint64_t z = (state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % below;
}

static void add_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    uint8_t *data = malloc(LARGEST);
    size_t size;

    if (!file || !data) {
        die(path);
    }
    size = fread(data, 1, LARGEST, file);
    if (ferror(file)) {
        die(path);
    }
    fclose(file);
    if (n_corpus == MAX_FILES) {
        free(data);
        return;
    }
    /* Exactly as large as the input, so that ASan sees the end of it. */
    corpus[n_corpus].data = realloc(data, size ? size : 1);
    corpus[n_corpus].size = size;
    n_corpus++;
}

static int no_dots(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

/* Sorted, so that a seed means the same everywhere. */
static void add_directory(const char *path)
{
    struct dirent **names;
    int n = scandir(path, &names, no_dots, alphasort);

    for (int i = 0; i < n; i++) {
        char file[PATH_MAX];

        if (snprintf(file, sizeof(file), "%s/%s", path, names[i]->d_name) <
            (int)sizeof(file)) {
            add_file(file);
        }
        free(names[i]);
    }
    if (n >= 0) {
        free(names);
    }
}

static void open_current(const char *name)
{
    const char *folder = getenv("TMPDIR");

    if (snprintf(current_name, sizeof(current_name), "%s/%s.%ld.input",
                 folder ? folder : "/tmp", name, (long)getpid()) >=
        (int)sizeof(current_name)) {
        die("TMPDIR is too long");
    }
    current_fd = open(current_name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC,
                      0600);
    if (current_fd < 0 || ftruncate(current_fd, LARGEST)) {
        die(current_name);
    }
    current = mmap(NULL, LARGEST, PROT_READ | PROT_WRITE, MAP_SHARED,
                   current_fd, 0);
    if (current == MAP_FAILED) {
        die(current_name);
    }
}

/*
 * Runs the first @size bytes of the file, as a copy that ends where its
 * allocation ends. The file is as long as the input for that time, and LARGEST
 * bytes before and after it.
 */
static void run(size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);

    if (!copy || ftruncate(current_fd, (off_t)size)) {
        die(current_name);
    }
    if (size) {
        memcpy(copy, current, size);
    }
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    if (ftruncate(current_fd, LARGEST)) {
        die(current_name);
    }
}

/* Puts a file of the corpus where run() takes it from. */
static size_t take(const struct input *input)
{
    if (input->size) {
        memcpy(current, input->data, input->size);
    }
    return input->size;
}

static const uint64_t interesting[] = {
    0, 1, 2, 7, 8, 9, 16, 21, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 511,
    512, 4095, 4096, 65535, 65536, 0x7fffffff, 0x80000000u, 0xffffffffu,
    0x100000000u, 0x00fffffffffffe00u, 0x7fffffffffffffffu,
    0x8000000000000000u, 0xffffffffffffffffu, 0xfffffffffffffff8u,
};

/* Puts a number of 1, 2, 4 or 8 bytes, of either byte order, somewhere. */
static void put_number(uint8_t *data, size_t size)
{
    size_t width = (size_t)1 << draw(4);
    uint64_t value = interesting[draw(sizeof(interesting) /
                                      sizeof(interesting[0]))];
    bool big = draw(2);
    size_t at;

    if (size < width) {
        return;
    }
    at = draw(size - width + 1);
    if (draw(2)) {
        at -= at % width; /* fields are aligned, mostly */
    }
    for (size_t i = 0; i < width; i++) {
        data[at + i] = (uint8_t)(value >> (8 * (big ? width - 1 - i : i)));
    }
}

/* One change; returns the new size. @data has room for LARGEST bytes. */
static size_t mutate(uint8_t *data, size_t size)
{
    const struct input *other = &corpus[draw(n_corpus)];
    size_t at = size ? draw(size) : 0;
    size_t n;

    switch (draw(8)) {
    case 0:
    case 1:
        if (size) {
            data[at] ^= (uint8_t)(1u << draw(8));
        }
        return size;
    case 2:
        if (size) {
            data[at] = (uint8_t)draw(256);
        }
        return size;
    case 3:
    case 4:
        put_number(data, size);
        return size;
    case 5: /* cut the end off */
        return at;
    case 6: /* remove or repeat a range */
        n = draw(size - at + 1);
        if (draw(2)) {
            memmove(data + at, data + at + n, size - at - n);
            return size - n;
        }
        if (n > LARGEST - size) {
            return size;
        }
        memmove(data + at + n, data + at, size - at);
        return size + n;
    default: /* overwrite with a range of another file */
        if (!other->size || !size) {
            return size;
        }
        n = draw((other->size < size - at ? other->size : size - at) + 1);
        memcpy(data + at, other->data + draw(other->size - n + 1), n);
        return size;
    }
}

static double now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static unsigned long run_mutations(void)
{
    unsigned factor = getenv("QLB_NIGHTLY") ? 30 : 1;
    double end = now() + SECONDS * factor;
    unsigned long runs;

    for (runs = 0; runs < (unsigned long)RUNS * factor && now() < end;
         runs++) {
        size_t size = take(&corpus[draw(n_corpus)]);

        for (uint64_t i = 1 + draw(6); i > 0; i--) {
            size = mutate(current, size);
        }
        run(size);
    }
    return runs;
}

int main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/');
    const char *name = slash ? slash + 1 : argv[0];
    const char *top = getenv("abs_top_srcdir");
    const char *seed = getenv("QLB_FUZZ_SEED");
    char path[PATH_MAX];

    state = seed ? strtoull(seed, NULL, 0) : 1;
    for (int i = 1; i < argc; i++) {
        add_file(argv[i]);
    }
    if (argc == 1) {
        if (snprintf(path, sizeof(path), "%s/tests/fuzz/corpus/%s",
                     top ? top : ".", name) >= (int)sizeof(path)) {
            die("the path of the corpus is too long");
        }
        add_directory(path);
    }
    open_current(name);
    printf("1..%d\n# input that runs: %s\n", argc == 1 ? 2 : 1, current_name);
    fflush(stdout);
    for (size_t i = 0; i < n_corpus; i++) {
        run(take(&corpus[i]));
    }
    printf("%sok 1 - %s: %zu files of its corpus\n", n_corpus ? "" : "not ",
           name, n_corpus);
    fflush(stdout);
    if (argc == 1) {
        unsigned long runs = n_corpus ? run_mutations() : 0;

        printf("%sok 2 - %s: inputs made from its corpus\n", runs ? "" : "not ",
               name);
        printf("# %lu inputs, QLB_FUZZ_SEED=%s\n", runs, seed ? seed : "1");
    }
    unlink(current_name);
    return n_corpus ? 0 : 1;
}
