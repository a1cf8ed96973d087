/* lbvm init-timer: has systemd back up a machine, prune and verify.
 *
 * What is written is what systemd/lbvm-*@.service read: the environment in
 * /etc/lbvm/MACHINE.conf, and, for each service, a drop-in that names the paths
 * it may write to. Without its environment no service begins, so that is
 * written last.
 *
 * systemd takes the quotes of an environment file away, and splits what is
 * within at blanks, unless they are quoted again. A word that would need more
 * than that is refused: to be wrong about a path is worse.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/commands.h"
#include "vm/nbd_way.h"
#include "vm/options.h"
#include "vm/retention.h"

enum {
    OPT_KEEP = TOOL_OPT_LONG, /* and the other rules, in their order */
    OPT_SAMPLE = OPT_KEEP + RETENTION_RULES, OPT_ROOT, OPT_FORCE, OPT_ENABLE,
};

enum { MAX_KEEP = 1000000 };

static const struct tool_option options[] = {
    VM_REPOSITORY_OPTION,
    VM_METRICS_OPTION,
    { "keep-last", OPT_KEEP + RETENTION_LAST, "N",
      "what lbvm prune keeps each day (default: none by this rule)" },
    { "keep-hourly", OPT_KEEP + RETENTION_HOURLY, "N", "(default: 24)" },
    { "keep-daily", OPT_KEEP + RETENTION_DAILY, "N", "(default: 7)" },
    { "keep-weekly", OPT_KEEP + RETENTION_WEEKLY, "N", "(default: 4)" },
    { "keep-monthly", OPT_KEEP + RETENTION_MONTHLY, "N", "(default: 12)" },
    { "keep-yearly", OPT_KEEP + RETENTION_YEARLY, "N", "(default: none)" },
    { "sample", OPT_SAMPLE, "PERCENT",
      "share of the archives that is verified daily (default: 15)" },
    { "enable", OPT_ENABLE, NULL, "run the commands that turn it on" },
    { "force", OPT_FORCE, NULL, "replace files that exist" },
    { "root", OPT_ROOT, "FOLDER", "for the system that has its root there" },
    TOOL_COMMON_OPTIONS
};

const struct tool vm_init_timer_tool = {
    .name = "lbvm init-timer",
    .synopsis = "[OPTION]... MACHINE ARGUMENT...",
    .summary = "Has systemd back up a machine each hour, with these arguments "
               "of 'lbvm backup', and\nprune and verify its backups each "
               "day.",
    .options = options,
};

static const char *const services[] = { "backup", "prune", "verify" };

enum { N_SERVICES = sizeof(services) / sizeof(services[0]) };

struct init_timer {
    struct vm_options common;
    const char *name;       /* of the machine */
    char *const *arguments; /* of lbvm backup */
    unsigned n_arguments;
    unsigned keep[RETENTION_RULES];
    bool has_keep, force, enable;
    unsigned percent;
    const char *root;
};

/* ---- words ---- */

static const char plain[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    "_@%+=:,./-";

/* A word that neither systemd nor a shell takes for another. */
static void check_word(const char *word, const char *what)
{
    json_t *utf8 = json_string(word);

    for (const char *c = word; *c != '\0'; c++) {
        if ((unsigned char)*c < ' ' || *c == 0x7f ||
            strchr("'\"\\$`", *c) != NULL) {
            tool_usage("%s: '%s' has a character that can't be in an "
                       "environment file: quotes, \\, $, `, or control "
                       "characters", what, word);
        }
    }
    if (*word == '\0' || utf8 == NULL) {
        tool_usage("%s: '%s' is empty, or no UTF-8", what, word);
    }
    json_decref(utf8);
}

static void check_path(const char *path, const char *what)
{
    check_word(path, what);
    if (*path != '/') {
        tool_usage("%s: '%s' must begin with /: a job of systemd has no other "
                   "folder to begin in", what, path);
    }
}

static void print_word(FILE *file, const char *word)
{
    bool quoted = strspn(word, plain) != strlen(word);

    fprintf(file, quoted ? "'%s'" : "%s", word);
}

/* "NAME=PATH" or "PATH", as lbvm backup takes it. */
static const char *image_path(const char *operand)
{
    const char *equals = strchr(operand, '='), *slash = strchr(operand, '/');

    return equals != NULL && (slash == NULL || equals < slash) ? equals + 1
                                                               : operand;
}

static const struct tool_option *find_option(const char *word)
{
    const struct tool_option *o = vm_backup_tool.options;
    size_t len = word[1] == '-' ? strcspn(word + 2, "=") : 0;

    while (o->name != NULL &&
           !(word[1] == '-' ? strlen(o->name) == len &&
                              strncmp(o->name, word + 2, len) == 0
                            : o->value == word[1] && word[1] != '\0' &&
                              word[2] == '\0')) {
        o++;
    }
    if (o->name == NULL) {
        tool_usage("'%s' is no option of lbvm backup", word);
    }
    return o;
}

/* folder: what the backup itself writes to. */
static void check_value(const struct tool_option *option, const char *value,
                        void (*folder)(void *opaque, const char *path),
                        void *opaque)
{
    bool is_folder = strcmp(option->argument, "FOLDER") == 0;

    check_word(value, option->name);
    if (option->value == VM_OPT_REPOSITORY ||
        option->value == VM_OPT_METRICS) {
        tool_usage("--%s is wanted before MACHINE: it is not of the backup "
                   "alone", option->name);
    }
    if (is_folder || strcmp(option->argument, "SOCKET") == 0 ||
        strcmp(option->argument, "FILE") == 0) {
        check_path(value, option->name);
    }
    if (is_folder && option->value != NBD_WAY_OPT_CERTIFICATES) {
        folder(opaque, value);
    }
}

/* What can be told now, and not in an hour: options that there are, and paths
 * that mean the same from everywhere. Calls image for each operand, folder for
 * each option that names one. */
static void walk_arguments(const struct init_timer *t,
                           void (*image)(void *opaque, const char *path),
                           void (*folder)(void *opaque, const char *path),
                           void *opaque)
{
    for (unsigned i = 0; i < t->n_arguments; i++) {
        const char *word = t->arguments[i], *value;
        const struct tool_option *option;

        check_word(word, "ARGUMENT");
        if (word[0] != '-') {
            check_path(image_path(word), "IMAGE");
            image(opaque, image_path(word));
            continue;
        }
        option = find_option(word);
        value = strchr(word, '=');
        if (option->argument == NULL) {
            continue;
        }
        if (value == NULL && i + 1 == t->n_arguments) {
            tool_usage("option '%s' wants an argument", word);
        }
        value = value != NULL ? value + 1 : t->arguments[++i];
        check_value(option, value, folder, opaque);
    }
}

/* ---- files ---- */

static char *below_root(const struct init_timer *t, const char *path,
                        struct qlb_error *err)
{
    char *full;

    if (asprintf(&full, "%s%s", t->root == NULL ? "" : t->root, path) < 0) {
        qlb_fail_errno(err, ENOMEM, "%s", path);
        return NULL;
    }
    return full;
}

/* All folders that the path is in. */
static int make_folders(char *path, struct qlb_error *err)
{
    for (char *slash = strchr(path + 1, '/'); slash != NULL;
         slash = strchr(slash + 1, '/')) {
        int ret;

        *slash = '\0';
        ret = mkdir(path, 0755) < 0 && errno != EEXIST
                  ? qlb_fail_errno(err, errno, "%s", path) : 0;
        *slash = '/';
        if (ret < 0) {
            return -1;
        }
    }
    return 0;
}

static int check_free(const struct init_timer *t, const char *path,
                      struct qlb_error *err)
{
    char *full = below_root(t, path, err);
    struct stat st;
    int ret = full == NULL ? -1 : 0;

    if (ret == 0 && !t->force && lstat(full, &st) == 0) {
        ret = qlb_fail(err, QLB_E_RUNTIME, "%s: already exists; --force "
                       "replaces it", full);
    }
    free(full);
    return ret;
}

/* text: released here. */
static int write_file(const struct init_timer *t, const char *path,
                      char *text, struct qlb_error *err)
{
    char *full = below_root(t, path, err);
    struct qlb_outfile *out = NULL;
    int ret = -1;

    if (full != NULL && make_folders(full, err) == 0) {
        out = qlb_outfile_create(full, t->force ? QLB_OUTFILE_FORCE : 0, err);
    }
    if (out != NULL && qlb_outfile_write(out, text, strlen(text), err) == 0) {
        ret = qlb_outfile_commit(out, err);
    }
    qlb_outfile_close(out);
    free(full);
    free(text);
    return ret;
}

static void conf_path(const struct init_timer *t, char path[256])
{
    snprintf(path, 256, "/etc/lbvm/%.100s.conf", t->name);
}

static void drop_in_path(const struct init_timer *t, unsigned service,
                         char path[256])
{
    snprintf(path, 256, "/etc/systemd/system/lbvm-%s@%.100s.service.d/"
             "lbvm.conf", services[service], t->name);
}

static void print_keep(const struct init_timer *t, FILE *file)
{
    static const unsigned usual[RETENTION_RULES] = {
        [RETENTION_HOURLY] = 24, [RETENTION_DAILY] = 7,
        [RETENTION_WEEKLY] = 4, [RETENTION_MONTHLY] = 12,
    };
    const unsigned *keep = t->has_keep ? t->keep : usual;
    const char *space = "";

    for (unsigned i = 0; i < RETENTION_RULES; i++) {
        if (keep[i] > 0) {
            fprintf(file, "%s--keep-%s=%u", space,
                    retention_name((enum retention_rule)i), keep[i]);
            space = " ";
        }
    }
}

static char *make_conf(const struct init_timer *t)
{
    const char *metrics = vm_metrics(&t->common);
    char *text = NULL;
    size_t size;
    FILE *file = open_memstream(&text, &size);

    if (file == NULL) {
        return NULL;
    }
    fprintf(file, "# Of lbvm-backup@%s.service, lbvm-prune@ and lbvm-verify@; "
            "see lbvm(1).\nLBVM_REPOSITORY=\"%s\"\n", t->name,
            vm_repository(&t->common));
    if (metrics != NULL) {
        fprintf(file, "LBVM_METRICS=\"%s\"\n", metrics);
    }
    fputs("LBVM_BACKUP=\"", file);
    for (unsigned i = 0; i < t->n_arguments; i++) {
        fputs(i == 0 ? "" : " ", file);
        print_word(file, t->arguments[i]);
    }
    fputs("\"\nLBVM_PRUNE=\"", file);
    print_keep(t, file);
    fprintf(file, "\"\nLBVM_VERIFY=\"--sample=%u\"\n", t->percent);
    return fclose(file) == 0 ? text : NULL;
}

/* In a unit, % begins a specifier. */
static void print_path(FILE *file, const char *prefix, const char *path,
                       size_t len)
{
    fprintf(file, "\"%s", prefix);
    for (size_t i = 0; i < len; i++) {
        fputs(path[i] == '%' ? "%" : "", file);
        fputc(path[i], file);
    }
    fputs("\" ", file);
}

static void print_folder_of(void *opaque, const char *path)
{
    const char *slash = strrchr(path, '/');

    print_path(opaque, "-", path, slash == path ? 1 : (size_t)(slash - path));
}

static void print_folder(void *opaque, const char *path)
{
    print_path(opaque, "-", path, strlen(path));
}

/* A repository or a file that is missing stops nothing here: lbvm says so. That
 * it must be mounted keeps a backup from filling the folder beneath. */
static char *make_drop_in(const struct init_timer *t, unsigned service)
{
    const char *metrics = vm_metrics(&t->common);
    const char *repository = vm_repository(&t->common);
    char *text = NULL;
    size_t size;
    FILE *file = open_memstream(&text, &size);

    if (file == NULL) {
        return NULL;
    }
    fputs("# Made by lbvm init-timer.\n\n[Unit]\n", file);
    if (store_is_remote(repository)) {
        fputs("After=network-online.target\nWants=network-online.target\n\n"
              "[Service]\nPrivateNetwork=no\n"
              "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n"
              "ReadWritePaths=", file);
    } else {
        fputs("RequiresMountsFor=", file);
        print_path(file, "", repository, strlen(repository));
        fputs("\n\n[Service]\nReadWritePaths=", file);
        print_path(file, "-", repository, strlen(repository));
    }
    if (metrics != NULL) {
        print_folder_of(file, metrics);
    }
    if (service == 0) {
        walk_arguments(t, print_folder_of, print_folder, file);
    }
    fputc('\n', file);
    return fclose(file) == 0 ? text : NULL;
}

static int write_files(const struct init_timer *t, struct qlb_error *err)
{
    char path[256], *text;

    conf_path(t, path);
    if (check_free(t, path, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < N_SERVICES; i++) {
        drop_in_path(t, i, path);
        if (check_free(t, path, err) < 0) {
            return -1;
        }
    }
    for (unsigned i = 0; i < N_SERVICES; i++) {
        drop_in_path(t, i, path);
        text = make_drop_in(t, i);
        if (text == NULL) {
            return qlb_fail_errno(err, ENOMEM, "%s", path);
        }
        if (write_file(t, path, text, err) < 0) {
            return -1;
        }
    }
    conf_path(t, path);
    text = make_conf(t);
    return text == NULL ? qlb_fail_errno(err, ENOMEM, "%s", path)
                        : write_file(t, path, text, err);
}

/* ---- systemctl ---- */

static int run_command(char *const *words, struct qlb_error *err)
{
    pid_t pid;
    int status, reason = posix_spawnp(&pid, words[0], NULL, NULL, words,
                                      environ);

    if (reason != 0) {
        return qlb_fail_errno(err, reason, "%s", words[0]);
    }
    while (waitpid(pid, &status, 0) < 0) {
        if (errno != EINTR) {
            return qlb_fail_errno(err, errno, "%s", words[0]);
        }
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        return qlb_fail(err, QLB_E_RUNTIME, "'%s %s%s%s' failed; the files "
                        "are written", words[0], words[1],
                        words[2] == NULL ? "" : " ",
                        words[2] == NULL ? "" : words[2]);
    }
    return 0;
}

enum { MAX_WORDS = 8 };

static int do_or_print(const struct init_timer *t, char *const *words,
                       struct qlb_error *err)
{
    if (t->enable) {
        return run_command(words, err);
    }
    for (unsigned i = 0; words[i] != NULL; i++) {
        printf("%s%s", i == 0 ? "" : " ", words[i]);
    }
    putchar('\n');
    return 0;
}

/* What reads the files, and starts the timers. Of another system nothing runs
 * now. */
static int turn_on(const struct init_timer *t, struct qlb_error *err)
{
    static char program[] = "systemctl", reload[] = "daemon-reload";
    static char enable[] = "enable", now[] = "--now";
    char *const first[] = { program, reload, NULL };
    char units[N_SERVICES][128], root[4096];
    char *words[MAX_WORDS] = { program, enable, now };

    if (t->root != NULL) {
        snprintf(root, sizeof(root), "--root=%s", t->root);
        words[1] = root;
        words[2] = enable;
    } else if (do_or_print(t, first, err) < 0) {
        return -1;
    }
    for (unsigned i = 0; i < N_SERVICES; i++) {
        snprintf(units[i], sizeof(units[i]), "lbvm-%s@%.100s.timer",
                 services[i], t->name);
        words[3 + i] = units[i];
    }
    return do_or_print(t, words, err);
}

/* ---- options ---- */

static void parse_option(struct init_timer *t, int option)
{
    char name[24];
    int rule = option - OPT_KEEP;

    switch (option) {
    case OPT_SAMPLE:
        t->percent = tool_parse_number(optarg, "--sample", 1, 100);
        break;
    case OPT_ROOT:
        t->root = optarg;
        break;
    case OPT_FORCE:
        t->force = true;
        break;
    case OPT_ENABLE:
        t->enable = true;
        break;
    default:
        if (!vm_take_option(&t->common, option)) {
            snprintf(name, sizeof(name), "--keep-%s",
                     retention_name((enum retention_rule)rule));
            t->keep[rule] = tool_parse_number(optarg, name, 1, MAX_KEEP);
            t->has_keep = true;
        }
    }
}

static void ignore_path(void *opaque, const char *path)
{
}

/* Options behind MACHINE are those of the backup. */
static void parse_options(struct init_timer *t, int argc, char **argv)
{
    int option;

    setenv("POSIXLY_CORRECT", "1", 1);
    while ((option = tool_getopt(&vm_init_timer_tool, argc, argv)) != -1) {
        parse_option(t, option);
    }
    unsetenv("POSIXLY_CORRECT");
    if (argc - optind < 2) {
        tool_usage("a MACHINE is wanted, and what 'lbvm backup' is told of "
                   "it, as --qmp=SOCKET");
    }
    t->name = argv[optind];
    t->arguments = argv + optind + 1;
    t->n_arguments = (unsigned)(argc - optind - 1);
    if (!machine_name_valid(t->name)) {
        tool_usage("'%s' is no name of a machine", t->name);
    }
    if (store_is_remote(vm_repository(&t->common))) {
        check_word(vm_repository(&t->common), "--repository");
    } else {
        check_path(vm_repository(&t->common), "--repository");
    }
    if (vm_metrics(&t->common) != NULL) {
        check_path(vm_metrics(&t->common), "--metrics");
    }
    walk_arguments(t, ignore_path, ignore_path, NULL);
}

int vm_init_timer(int argc, char **argv)
{
    struct init_timer t = { .percent = 15 };
    struct qlb_error err;

    parse_options(&t, argc, argv);
    if (write_files(&t, &err) < 0 || turn_on(&t, &err) < 0) {
        return tool_fail(NULL, &err);
    }
    if (t.root == NULL && !store_is_remote(vm_repository(&t.common)) &&
        access(vm_repository(&t.common), F_OK) < 0) {
        tool_message("%s: is not there yet, and a job of systemd can't make "
                     "it: make the folder, or back up once by hand",
                     vm_repository(&t.common));
    }
    return tool_flush_stdout();
}
