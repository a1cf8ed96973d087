/* lbvm ls and cat: single files out of a disk of a backup.
 *
 * The disk is shown as a file in a folder of our own (backup_file.h), and debugfs
 * reads what is on it: nothing is mounted but that, and nobody need be root. A
 * file system whose journal has something to tell, as that of a guest that ran,
 * has it replayed by e2fsck first, into a layer that is forgotten.
 *
 * debugfs ends with 0 whatever happens; that it has nothing to say is what tells
 * that all went well.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/backup_file.h"
#include "vm/command.h"
#include "vm/commands.h"
#include "vm/partitions.h"
#include "vm/restorable.h"

enum { OPT_AT = TOOL_OPT_LONG, OPT_DISK, OPT_PARTITION };

#define BROWSE_OPTIONS                                                       \
    VM_REPOSITORY_OPTION,                                                    \
    { "at", OPT_AT, "TIME", "the newest backup of that time or before it" }, \
    { "disk", OPT_DISK, "NAME",                                              \
      "which disk, where the machine has several" },                         \
    { "partition", OPT_PARTITION, "N",                                       \
      "which partition, where several have file systems" }

static const struct tool_option ls_options[] = {
    BROWSE_OPTIONS,
    VM_JSON_OPTION,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_ls_tool = {
    .name = "lbvm ls",
    .synopsis = "[OPTION]... MACHINE [ID] PATH",
    .summary = "Lists a folder of an ext2, ext3 or ext4 file system in a backup, "
               "the newest one\nunless its ID is given (its start is enough), "
               "or --at.",
    .options = ls_options,
};

static const struct tool_option cat_options[] = {
    BROWSE_OPTIONS,
    TOOL_COMMON_OPTIONS
};

const struct tool vm_cat_tool = {
    .name = "lbvm cat",
    .synopsis = "[OPTION]... MACHINE [ID] PATH > FILE",
    .summary = "Prints a file of an ext2, ext3 or ext4 file system in a backup, "
               "the newest one\nunless its ID is given (its start is enough), "
               "or --at.",
    .options = cat_options,
};

/* Of an ext file system: the superblock, and in it. */
enum { SUPER = 1024, SUPER_MAGIC = 56, SUPER_INCOMPAT = 96,
       NEEDS_RECOVERY = 4 };

struct browse {
    struct restorable from;
    const char *disk_name;  /* NULL: the only one */
    unsigned partition;     /* 0: find it */
    const char *path;

    const struct manifest_disk *disk;
    char *folder;           /* ours */
    pid_t pid;              /* of nbdfuse */
    char *system;           /* "FILE?offset=N", as debugfs and e2fsck want */
};

#define STEM "disk"

/* ---- the disk as a file ---- */

static int choose_disk(struct browse *b, struct qlb_error *err)
{
    const struct manifest *manifest = b->from.manifest;

    if (b->disk_name != NULL) {
        b->disk = restorable_disk(&b->from, b->disk_name, err);
        return b->disk == NULL ? -1 : 0;
    }
    if (manifest->n_disks > 1) {
        return qlb_fail(err, QLB_E_USAGE, "%s: %s has %u disks; --disk=NAME "
                        "is wanted", b->from.name, manifest->id,
                        manifest->n_disks);
    }
    b->disk = &manifest->disks[0];
    return 0;
}

static int make_folder(struct browse *b, struct qlb_error *err)
{
    const char *parent = getenv("TMPDIR");

    if (asprintf(&b->folder, "%s/lbvm.XXXXXX",
                 parent == NULL || *parent == '\0' ? "/tmp" : parent) < 0) {
        b->folder = NULL;
        return qlb_fail_errno(err, ENOMEM, "making a folder");
    }
    if (mkdtemp(b->folder) == NULL) {
        qlb_fail_errno(err, errno, "%s", b->folder);
        free(b->folder);
        b->folder = NULL;
        return -1;
    }
    return 0;
}

static int show_disk(struct browse *b, struct qlb_error *err)
{
    struct qlb_chain *chain = restorable_chain(&b->from, b->disk, err);
    int ret = chain == NULL || make_folder(b, err) < 0 ||
              backup_file_mount(b->folder, STEM, chain, true, &b->pid,
                                err) < 0 ? -1 : 0;

    qlb_chain_close(chain);
    return ret;
}

static void take_disk_away(struct browse *b)
{
    struct qlb_error err;

    if (b->folder == NULL) {
        return;
    }
    if (backup_file_unmount(b->folder, STEM, &err) < 0) {
        tool_fail(NULL, &err);
    } else if (b->pid > 0) {
        waitpid(b->pid, NULL, 0);
    }
    rmdir(b->folder);
}

/* ---- the file system ---- */

/* 1; 0; -1. recover: whether its journal has something to tell. */
static int has_system(int fd, uint64_t offset, bool *recover,
                      struct qlb_error *err)
{
    uint8_t super[SUPER_INCOMPAT + 4];
    ssize_t n = pread(fd, super, sizeof(super), (off_t)(offset + SUPER));

    if (n < 0) {
        return qlb_fail_errno(err, errno, "reading the disk");
    }
    if (n < (ssize_t)sizeof(super)) {
        return 0;
    }
    *recover = super[SUPER_INCOMPAT] & NEEDS_RECOVERY;
    return super[SUPER_MAGIC] == 0x53 && super[SUPER_MAGIC + 1] == 0xef;
}

static int fail_none(const struct browse *b, const char *what,
                     struct qlb_error *err)
{
    return qlb_fail(err, QLB_E_RUNTIME, "disk '%s': %s; 'lbvm mount' shows the "
                    "disk as a whole", b->disk->name, what);
}

static int choose_partition(const struct browse *b, int fd,
                            const struct partition *list, unsigned n,
                            uint64_t *offset, bool *recover,
                            struct qlb_error *err)
{
    char found[200] = "";
    unsigned count = 0;

    for (unsigned i = 0; i < n; i++) {
        size_t used = strlen(found);
        bool flag;
        int ret;

        if (b->partition != 0 && list[i].number != b->partition) {
            continue;
        }
        ret = has_system(fd, list[i].offset, &flag, err);
        if (ret < 0) {
            return -1;
        }
        if (ret > 0) {
            *offset = list[i].offset;
            *recover = flag;
            count++;
            snprintf(found + used, sizeof(found) - used, "%s %u",
                     used > 0 ? "," : "", list[i].number);
        }
    }
    if (count == 0) {
        return fail_none(b, b->partition != 0
                                ? "that partition has no ext2, ext3 or ext4 "
                                  "file system"
                                : "there is no ext2, ext3 or ext4 file system",
                         err);
    }
    return count == 1 ? 0
           : qlb_fail(err, QLB_E_USAGE, "disk '%s': there are file systems in "
                      "several partitions; --partition is wanted:%s",
                      b->disk->name, found);
}

static int find_system(const struct browse *b, int fd, uint64_t *offset,
                       bool *recover, struct qlb_error *err)
{
    struct partition list[PARTITIONS_MAX];
    int n;

    if (b->partition == 0) {
        int ret = has_system(fd, 0, recover, err);

        if (ret != 0) {
            *offset = 0;
            return ret < 0 ? -1 : 0;
        }
    }
    n = partitions_read(fd, b->disk->size, list, err);
    return n < 0 ? -1 : choose_partition(b, fd, list, (unsigned)n, offset,
                                         recover, err);
}

/* ---- debugfs and e2fsck ---- */

/* Damage in an archive is why, where there is any. */
static int fail_of(const struct browse *b, const char *text,
                   struct qlb_error *err)
{
    char word[1024];

    backup_file_last_word(b->folder, STEM, word, sizeof(word));
    return *word != '\0'
               ? qlb_fail(err, QLB_E_DAMAGED, "disk '%s': %s", b->disk->name,
                          word)
               : qlb_fail(err, QLB_E_RUNTIME, "disk '%s': %s", b->disk->name,
                          text);
}

static void one_line(char *text)
{
    size_t len = strlen(text);

    while (len > 0 && text[len - 1] == '\n') {
        text[--len] = '\0';
    }
    for (char *c = text; *c != '\0'; c++) {
        if (*c == '\n' || *c == '\r') {
            *c = ' ';
        }
    }
}

/* The first line tells the version. */
static char *debugfs_complaint(char *said)
{
    if (strncmp(said, "debugfs ", 8) == 0) {
        said += strcspn(said, "\n");
        said += *said != '\0';
    }
    one_line(said);
    return said;
}

static int judge(const struct browse *b, int errors, int status,
                 struct qlb_error *err)
{
    size_t len;
    char *said = command_text(errors, &len, err), *complaint;
    int ret = 0;

    if (said == NULL) {
        return -1;
    }
    complaint = debugfs_complaint(said);
    if (*complaint != '\0' || !WIFEXITED(status) ||
        WEXITSTATUS(status) != 0) {
        ret = fail_of(b, *complaint != '\0' ? complaint
                                            : "debugfs did not end well",
                      err);
    }
    free(said);
    return ret;
}

/* "VERB "PATH"": a quote is doubled. */
static char *request_of(const char *verb, const char *path)
{
    char *request = malloc(strlen(verb) + 2 * strlen(path) + 4), *to;

    if (request == NULL) {
        return NULL;
    }
    to = request + sprintf(request, "%s \"", verb);
    for (; *path != '\0'; path++) {
        if (*path == '"') {
            *to++ = '"';
        }
        *to++ = *path;
    }
    strcpy(to, "\"");
    return request;
}

static int debugfs(const struct browse *b, const char *verb, int out,
                   struct qlb_error *err)
{
    char *request = request_of(verb, b->path);
    const char *const words[] = { "debugfs", "-c", "-R", request, b->system,
                                  NULL };
    int errors = command_scratch(err), status, ret = -1;

    if (request == NULL) {
        qlb_fail_errno(err, ENOMEM, "%s", b->path);
    } else if (errors >= 0 &&
               command_run(words, out, errors, &status, err) == 0) {
        ret = judge(b, errors, status, err);
    }
    if (errors >= 0) {
        close(errors);
    }
    free(request);
    return ret;
}

/* What it prints, for the caller to free. */
static char *debugfs_text(const struct browse *b, const char *verb,
                          struct qlb_error *err)
{
    int out = command_scratch(err);
    char *text = NULL;
    size_t len;

    if (out >= 0 && debugfs(b, verb, out, err) == 0) {
        text = command_text(out, &len, err);
    }
    if (out >= 0) {
        close(out);
    }
    return text;
}

/* "Inode: 12   Type: regular    Mode: ..." name: what we call it. */
static int check_type(const struct browse *b, const char *wanted,
                      const char *name, struct qlb_error *err)
{
    char *text = debugfs_text(b, "stat", err), type[32] = "";
    const char *at;
    int ret;

    if (text == NULL) {
        return -1;
    }
    at = strstr(text, "Type: ");
    if (at != NULL) {
        sscanf(at, "Type: %31s", type);
    }
    ret = strcmp(type, wanted) == 0
              ? 0 : qlb_fail(err, QLB_E_RUNTIME, "disk '%s': %s: is no %s, "
                             "but: %s", b->disk->name, b->path, name, type);
    free(text);
    return ret;
}

/* Status 1: it has changed the file system, as it should. */
static int replay_journal(const struct browse *b, struct qlb_error *err)
{
    const char *const words[] = { "e2fsck", "-y", "-E", "journal_only",
                                  b->system, NULL };
    int said = command_scratch(err), status, ret = -1;
    size_t len;
    char *text;

    if (said >= 0 && command_run(words, said, said, &status, err) == 0 &&
        (text = command_text(said, &len, err)) != NULL) {
        one_line(text);
        ret = WIFEXITED(status) && WEXITSTATUS(status) <= 1
                  ? 0 : fail_of(b, text, err);
        free(text);
    }
    if (said >= 0) {
        close(said);
    }
    return ret;
}

static int open_system(struct browse *b, struct qlb_error *err)
{
    char *path = backup_file_path(b->folder, STEM, err);
    bool recover = false;
    uint64_t offset = 0;
    int fd, ret;

    if (path == NULL) {
        return -1;
    }
    fd = open(path, O_RDONLY | O_CLOEXEC);
    ret = fd < 0 ? qlb_fail_errno(err, errno, "%s", path)
                 : find_system(b, fd, &offset, &recover, err);
    if (fd >= 0) {
        close(fd);
    }
    if (ret == 0 && asprintf(&b->system, "%s?offset=%llu", path,
                             (unsigned long long)offset) < 0) {
        b->system = NULL;
        ret = qlb_fail_errno(err, ENOMEM, "%s", path);
    }
    free(path);
    return ret == 0 && recover ? replay_journal(b, err) : ret;
}

/* ---- ls ---- */

static const char *type_name(unsigned mode)
{
    switch (mode & S_IFMT) {
    case S_IFREG: return "file";
    case S_IFDIR: return "folder";
    case S_IFLNK: return "link";
    default: return "other";
    }
}

struct entry {
    char *name;
    unsigned mode, uid, gid;
    unsigned long long size;
};

/* "/INODE/MODE/UID/GID/NAME/SIZE/", where SIZE is empty for what has none. 1; 0:
 * what is not told; -1: no such line, as where a name has a newline in it. */
static int parse_entry(char *line, struct entry *entry)
{
    unsigned long long inode;
    int used = 0;
    char *end;

    if (sscanf(line, "/%llu/%o/%u/%u/%n", &inode, &entry->mode, &entry->uid,
               &entry->gid, &used) < 4 || used == 0) {
        return -1;
    }
    entry->name = line + used;
    end = strchr(entry->name, '/');
    if (end == NULL || end[strspn(end, "/0123456789")] != '\0') {
        return -1;
    }
    *end = '\0';
    entry->size = strtoull(end + 1, NULL, 10);
    return inode != 0 && strcmp(entry->name, ".") != 0 &&
           strcmp(entry->name, "..") != 0;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct entry *)a)->name,
                  ((const struct entry *)b)->name);
}

/* Cuts the text into entries, which point into it. The array is the caller's;
 * NULL on failure. */
static struct entry *parse_entries(char *text, unsigned *n,
                                   struct qlb_error *err)
{
    size_t lines = 1;
    struct entry *entries;
    char *line;

    for (const char *c = text; *c != '\0'; c++) {
        lines += *c == '\n';
    }
    entries = calloc(lines, sizeof(*entries));
    if (entries == NULL) {
        qlb_fail_errno(err, ENOMEM, "listing");
        return NULL;
    }
    *n = 0;
    for (char *next = text; (line = strsep(&next, "\n")) != NULL;) {
        int ret = *line == '\0' ? 0 : parse_entry(line, &entries[*n]);

        if (ret < 0) {
            qlb_fail(err, QLB_E_RUNTIME, "there is a name that can't be "
                     "listed, with a newline in it");
            free(entries);
            return NULL;
        }
        *n += (unsigned)ret;
    }
    qsort(entries, *n, sizeof(*entries), by_name);
    return entries;
}

static json_t *describe(const struct entry *entry)
{
    json_t *json = json_pack("{s:s, s:I, s:i, s:i, s:i}", "type",
                             type_name(entry->mode), "size",
                             (json_int_t)entry->size, "mode",
                             (int)(entry->mode & 07777), "uid",
                             (int)entry->uid, "gid", (int)entry->gid);

    if (json_object_set_new(json, "name", json_string(entry->name)) < 0) {
        /* it is no UTF-8 */
        json_object_set_new(json, "name_hex",
                            tool_json_hex((const uint8_t *)entry->name,
                                          strlen(entry->name)));
    }
    return json;
}

/* A guest's names do not command the operator's terminal. */
static void print_name(const char *name, bool folder)
{
    bool terminal = isatty(STDOUT_FILENO);

    for (; *name != '\0'; name++) {
        putchar(terminal && iscntrl((unsigned char)*name) ? '?' : *name);
    }
    printf("%s\n", folder ? "/" : "");
}

static int print_entries(const struct browse *b, const struct entry *entries,
                         unsigned n)
{
    json_t *list = json_array();

    for (unsigned i = 0; i < n; i++) {
        if (b->from.common.json) {
            json_array_append_new(list, describe(&entries[i]));
        } else {
            print_name(entries[i].name, S_ISDIR(entries[i].mode));
        }
    }
    if (b->from.common.json) {
        return tool_print_json(json_pack("{s:s, s:s, s:s, s:s, s:o}",
                                         "machine", b->from.name, "id",
                                         b->from.manifest->id, "disk",
                                         b->disk->name, "path", b->path,
                                         "entries", list), false);
    }
    json_decref(list);
    return tool_flush_stdout();
}

static int list(const struct browse *b, struct qlb_error *err)
{
    struct entry *entries;
    unsigned n;
    char *text;
    int ret = -1;

    if (check_type(b, "directory", "folder", err) < 0 ||
        (text = debugfs_text(b, "ls -p", err)) == NULL) {
        return -1;
    }
    entries = parse_entries(text, &n, err);
    if (entries != NULL && print_entries(b, entries, n) < 0) {
        qlb_fail(err, QLB_E_RUNTIME, "standard output: not written");
    } else if (entries != NULL) {
        ret = 0;
    }
    free(entries);
    free(text);
    return ret;
}

/* ---- cat ---- */

static int print_file(const struct browse *b, struct qlb_error *err)
{
    return check_type(b, "regular", "file", err) < 0
               ? -1 : debugfs(b, "cat", STDOUT_FILENO, err);
}

/* ---- both ---- */

static int browse(struct browse *b,
                  int (*work)(const struct browse *b, struct qlb_error *err))
{
    struct qlb_error err;
    int status = restorable_open(&b->from);

    if (status == 0 &&
        (choose_disk(b, &err) < 0 || show_disk(b, &err) < 0 ||
         open_system(b, &err) < 0 || work(b, &err) < 0)) {
        status = tool_fail(NULL, &err);
        restorable_hint(&b->from, status);
    }
    take_disk_away(b);
    restorable_close(&b->from);
    free(b->system);
    free(b->folder);
    return status;
}

static void parse_options(struct browse *b, const struct tool *tool, int argc,
                          char **argv)
{
    int option;

    while ((option = tool_getopt(tool, argc, argv)) != -1) {
        switch (option) {
        case OPT_AT:
            b->from.has_at = true;
            b->from.at = vm_parse_time(optarg, "--at");
            break;
        case OPT_DISK:
            b->disk_name = optarg;
            break;
        case OPT_PARTITION:
            b->partition = tool_parse_number(optarg, "--partition", 1,
                                             PARTITIONS_MAX);
            break;
        default:
            vm_take_option(&b->from.common, option);
        }
    }
    if (argc - optind < 2 || argc - optind > 3) {
        tool_usage("a MACHINE, at most one ID, and a PATH are wanted, %d "
                   "words given", argc - optind);
    }
    b->path = argv[argc - 1];
    if (b->path[0] != '/' || strchr(b->path, '\n') != NULL) {
        tool_usage("'%s': a PATH begins with a slash, and has no newline",
                   b->path);
    }
    restorable_parse(&b->from, argc - 1, argv);
}

int vm_ls(int argc, char **argv)
{
    struct browse b = { 0 };

    parse_options(&b, &vm_ls_tool, argc, argv);
    return browse(&b, list);
}

int vm_cat(int argc, char **argv)
{
    struct browse b = { 0 };

    parse_options(&b, &vm_cat_tool, argc, argv);
    return browse(&b, print_file);
}
