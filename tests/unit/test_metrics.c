/* The file for Prometheus: what is told, what is kept, and what a hostile old
 * file does.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/metrics.h"

static char folder[4096];
static struct qlb_error err;

/* Each test has a folder of its own and works in it. */
static int enter_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/test_metrics.XXXXXX",
             base != NULL ? base : "/tmp");
    return mkdtemp(folder) == NULL ? -1 : chdir(folder);
}

static int leave_folder(void **state)
{
    char command[8300];

    (void)state;
    snprintf(command, sizeof(command), "rm -rf '%s'", folder);
    return chdir("/") == 0 ? system(command) : -1;
}

static void put(const char *path, const void *data, size_t len)
{
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

/* The caller frees it. */
static char *get(const char *path)
{
    FILE *f = fopen(path, "r");
    char *text = calloc(1, 2 << 20);

    assert_non_null(f);
    assert_non_null(text);
    assert_true(fread(text, 1, (2 << 20) - 1, f) > 0);
    fclose(f);
    return text;
}

static void expect_file(const char *path, const char *want)
{
    char *text = get(path);

    assert_string_equal(text, want);
    free(text);
}

static bool has_line(const char *path, const char *line)
{
    char *text = get(path), *at = strstr(text, line);
    size_t len = strlen(line);
    bool found = at != NULL && (at == text || at[-1] == '\n') &&
                 at[len] == '\n';

    free(text);
    return found;
}

static unsigned count(const char *path, const char *part)
{
    char *text = get(path);
    unsigned n = 0;

    for (char *at = text; (at = strstr(at, part)) != NULL; at++) {
        n++;
    }
    free(text);
    return n;
}

static const struct metrics_disk two_disks[] = {
    { .name = "vda", .bytes = 1000, .chain_length = 1 },
    { .name = "vdb", .bytes = 2000, .chain_length = 3 },
};

static struct metrics good_backup(uint64_t time)
{
    return (struct metrics) {
        .machine = "web1", .repository = "/r", .command = METRICS_BACKUP,
        .time = time, .seconds = 2.5, .disks = two_disks, .n_disks = 2,
    };
}

static void write_good(const char *path, const struct metrics *metrics)
{
    assert_int_equal(metrics_write(path, metrics, &err), 0);
}

/* ---- what is told ---- */

#define FAMILY(name, help)                                                   \
    "# HELP " name " " help "\n# TYPE " name " gauge\n"
#define OF "{machine=\"web1\",repository=\"/r\""

static void backup_is_told(void **state)
{
    struct metrics m = good_backup(1790000000);

    write_good("m.prom", &m);
    expect_file("m.prom",
        FAMILY("lbvm_last_success_timestamp_seconds",
               "When the command last succeeded.")
        "lbvm_last_success_timestamp_seconds" OF
        ",command=\"backup\"} 1790000000\n"
        FAMILY("lbvm_last_attempt_timestamp_seconds",
               "When the command last ended.")
        "lbvm_last_attempt_timestamp_seconds" OF
        ",command=\"backup\"} 1790000000\n"
        FAMILY("lbvm_last_status", "Exit status of the last attempt.")
        "lbvm_last_status" OF ",command=\"backup\"} 0\n"
        FAMILY("lbvm_backup_bytes",
               "Size of the disk's archive in the newest backup.")
        "lbvm_backup_bytes" OF ",disk=\"vda\"} 1000\n"
        "lbvm_backup_bytes" OF ",disk=\"vdb\"} 2000\n"
        FAMILY("lbvm_backup_duration_seconds",
               "How long the last successful backup took.")
        "lbvm_backup_duration_seconds" OF "} 2.5\n"
        FAMILY("lbvm_chain_length",
               "Archives that a restore of the newest backup reads.")
        "lbvm_chain_length" OF ",disk=\"vda\"} 1\n"
        "lbvm_chain_length" OF ",disk=\"vdb\"} 3\n");
}

static void failure_keeps_last_success(void **state)
{
    struct metrics m = good_backup(100);

    write_good("m.prom", &m);
    m.time = 200;
    m.status = 4;
    m.seconds = 99;
    m.n_disks = 0;
    write_good("m.prom", &m);
    assert_true(has_line("m.prom", "lbvm_last_success_timestamp_seconds" OF
                         ",command=\"backup\"} 100"));
    assert_true(has_line("m.prom", "lbvm_last_attempt_timestamp_seconds" OF
                         ",command=\"backup\"} 200"));
    assert_true(has_line("m.prom",
                         "lbvm_last_status" OF ",command=\"backup\"} 4"));
    assert_true(has_line("m.prom", "lbvm_backup_duration_seconds" OF "} 2.5"));
    assert_true(has_line("m.prom",
                         "lbvm_backup_bytes" OF ",disk=\"vdb\"} 2000"));
}

static void commands_keep_each_other(void **state)
{
    struct metrics m = good_backup(100);

    write_good("m.prom", &m);
    m.command = METRICS_VERIFY;
    m.time = 200;
    m.n_disks = 0;
    write_good("m.prom", &m);
    m.time = 300;
    m.status = 4;
    write_good("m.prom", &m);
    m = good_backup(400);
    m.command = METRICS_PRUNE;
    m.n_disks = 1;
    write_good("m.prom", &m);
    assert_true(has_line("m.prom", "lbvm_last_verified_timestamp_seconds" OF
                         "} 200"));
    assert_true(has_line("m.prom",
                         "lbvm_last_status" OF ",command=\"verify\"} 4"));
    assert_true(has_line("m.prom", "lbvm_last_success_timestamp_seconds" OF
                         ",command=\"backup\"} 100"));
    assert_true(has_line("m.prom", "lbvm_last_success_timestamp_seconds" OF
                         ",command=\"prune\"} 400"));
    /* a disk that the newest backup has not is gone */
    assert_int_equal(count("m.prom", "disk=\"vdb\""), 0);
    assert_int_equal(count("m.prom", "disk=\"vda\""), 2);
    assert_int_equal(count("m.prom", "# HELP lbvm_last_status "), 1);
}

static void machines_and_repositories_share_a_file(void **state)
{
    struct metrics m = good_backup(100);

    write_good("m.prom", &m);
    m.machine = "web2";
    write_good("m.prom", &m);
    m.repository = "/other";
    m.time = 300;
    write_good("m.prom", &m);
    assert_int_equal(count("m.prom", "\nlbvm_last_status{"), 3);
    assert_int_equal(count("m.prom", "\nlbvm_chain_length{"), 6);
    assert_true(has_line("m.prom", "lbvm_last_success_timestamp_seconds" OF
                         ",command=\"backup\"} 100"));
    assert_true(has_line("m.prom", "lbvm_last_success_timestamp_seconds"
                         "{machine=\"web2\",repository=\"/other\","
                         "command=\"backup\"} 300"));
}

static void everybody_may_read_it(void **state)
{
    struct metrics m = good_backup(100);
    mode_t mask = umask(0077);
    struct stat st;

    write_good("m.prom", &m);
    umask(mask);
    assert_int_equal(stat("m.prom", &st), 0);
    assert_int_equal(st.st_mode & 07777, 0644);
}

/* ---- labels ---- */

static void labels_are_escaped_and_come_back(void **state)
{
    const struct metrics_disk disk = {
        .name = "a\"b\\c\nd\x01" "e\xff" "f\xc3\xa9", .bytes = 7,
        .chain_length = 2,
    };
    struct metrics m = good_backup(100);
    const char *line = "lbvm_backup_bytes{machine=\"web1\",repository="
                       "\"/r\\\\ \\\"x\\\"\",disk="
                       "\"a\\\"b\\\\c\\nd?e?f\xc3\xa9\"} 7";

    m.repository = "/r\\ \"x\"";
    m.disks = &disk;
    m.n_disks = 1;
    write_good("m.prom", &m);
    assert_true(has_line("m.prom", line));
    /* read back as it was: kept by a failure, and by another disk replaced */
    m.status = 1;
    write_good("m.prom", &m);
    assert_true(has_line("m.prom", line));
    assert_int_equal(count("m.prom", "\nlbvm_last_status{"), 1);
    m.status = 0;
    m.disks = two_disks;
    write_good("m.prom", &m);
    assert_false(has_line("m.prom", line));
}

/* ---- the old file ---- */

static void hostile_lines_are_dropped(void **state)
{
    static const char *const lines[] = {
        "",
        "lbvm_last_status",
        "lbvm_last_status 5",
        "lbvm_last_status{} 5",
        "lbvm_last_status{machine=\"x\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"y\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"y\",disk=\"z\"} 5",
        "lbvm_last_status{machine=\"x\",machine=\"y\",repository=\"y\","
            "command=\"z\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\",} 5",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"}5",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} NaN",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} -1",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} 1e999",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} 1 2",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} ",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\\",
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"\\x\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"\xff\",command=\"z\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"\xed\xa0\x80\","
            "command=\"z\"} 5",
        "lbvm_last_status{machine=\"x\",repository=\"\r\",command=\"z\"} 5",
        "lbvm_last_statusx{machine=\"x\",repository=\"y\",command=\"z\"} 5",
        "node_load1{machine=\"x\",repository=\"y\",command=\"z\"} 5",
        "# HELP lbvm_last_status lies",
        "{machine=\"x\"} 5",
    };
    FILE *f = fopen("m.prom", "w");
    struct metrics m = good_backup(100);
    char *want;

    assert_non_null(f);
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        fprintf(f, "%s\n", lines[i]);
    }
    assert_int_equal(fclose(f), 0);
    write_good("m.prom", &m);
    write_good("fresh.prom", &m);
    want = get("fresh.prom");
    expect_file("m.prom", want);
    free(want);
}

static void good_line_beside_them_stays(void **state)
{
    static const char good[] =
        "lbvm_last_status{machine=\"x\",repository=\"y\",command=\"z\"} 5\n";
    static const char nul[] =
        "lbvm_last_status{machine=\"n\",repository=\"y\",command=\"z\"} 5\0x\n";
    static const char torn[] =
        "lbvm_last_status{machine=\"t\",repository=\"y\",command=\"z\"} 5";
    char text[sizeof(good) + sizeof(nul) + sizeof(torn)];
    struct metrics m = good_backup(100);
    size_t len = 0;

    memcpy(text, nul, sizeof(nul) - 1);
    len += sizeof(nul) - 1;
    memcpy(text + len, good, sizeof(good) - 1);
    len += sizeof(good) - 1;
    memcpy(text + len, torn, sizeof(torn) - 1);
    len += sizeof(torn) - 1;
    put("m.prom", text, len);
    write_good("m.prom", &m);
    assert_int_equal(count("m.prom", "\nlbvm_last_status{"), 2);
    assert_true(has_line("m.prom", "lbvm_last_status{machine=\"x\","
                         "repository=\"y\",command=\"z\"} 5"));
}

static void huge_file_counts_as_none(void **state)
{
    size_t len = (1 << 20) + 1;
    char *text = malloc(len);
    struct metrics m = good_backup(100);

    assert_non_null(text);
    memset(text, '{', len);
    put("m.prom", text, len);
    free(text);
    write_good("m.prom", &m);
    assert_int_equal(count("m.prom", "\nlbvm_last_status{"), 1);
}

static void links_and_fifos_are_replaced(void **state)
{
    struct metrics m = good_backup(100);
    struct stat st;

    put("victim", "precious", 8);
    assert_int_equal(symlink("victim", "m.prom"), 0);
    write_good("m.prom", &m);
    expect_file("victim", "precious");
    assert_int_equal(lstat("m.prom", &st), 0);
    assert_true(S_ISREG(st.st_mode));
    assert_int_equal(mkfifo("f.prom", 0600), 0);
    write_good("f.prom", &m);
    assert_int_equal(count("f.prom", "\nlbvm_last_status{"), 1);
}

/* ---- what goes wrong ---- */

static void failures_are_told_and_leave_nothing(void **state)
{
    struct metrics m = good_backup(100);

    assert_int_equal(metrics_write("nowhere/m.prom", &m, &err), -1);
    assert_int_equal(err.code, QLB_E_RUNTIME);
    assert_string_equal(err.message,
                        "nowhere/m.prom: No such file or directory");
    assert_int_equal(mkdir("d", 0700), 0);
    assert_int_equal(mkdir("d/m.prom", 0700), 0);
    assert_int_equal(metrics_write("d/m.prom", &m, &err), -1);
    assert_string_equal(err.message, "d/m.prom: writing: Is a directory");
    assert_int_equal(rmdir("d/m.prom"), 0);
    assert_int_equal(rmdir("d"), 0); /* so it is empty */
}

static void several_at_once_lose_nothing(void **state)
{
    enum { PROCESSES = 8 };
    pid_t pids[PROCESSES];

    for (unsigned i = 0; i < PROCESSES; i++) {
        pids[i] = fork();
        if (pids[i] == 0) {
            char name[16];
            struct metrics m = good_backup(100);

            snprintf(name, sizeof(name), "web%u", i);
            m.machine = name;
            _exit(metrics_write("m.prom", &m, &err) == 0 ? 0 : 1);
        }
    }
    for (unsigned i = 0; i < PROCESSES; i++) {
        int status;

        assert_int_equal(waitpid(pids[i], &status, 0), pids[i]);
        assert_int_equal(status, 0);
    }
    assert_int_equal(count("m.prom", "\nlbvm_last_status{"), PROCESSES);
}

#define TEST(name) \
    cmocka_unit_test_setup_teardown(name, enter_folder, leave_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(backup_is_told),
        TEST(failure_keeps_last_success),
        TEST(commands_keep_each_other),
        TEST(machines_and_repositories_share_a_file),
        TEST(everybody_may_read_it),
        TEST(labels_are_escaped_and_come_back),
        TEST(hostile_lines_are_dropped),
        TEST(good_line_beside_them_stays),
        TEST(huge_file_counts_as_none),
        TEST(links_and_fifos_are_replaced),
        TEST(failures_are_told_and_leave_nothing),
        TEST(several_at_once_lose_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
