/* Outputs that are whole or not there; block I/O and its image locks.
 *
 * SPDX-License-Identifier: LGPL-2.1-or-later
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "blkio.h"
#include "outfile.h"

static char folder[4096];

static int enter_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/test_files.XXXXXX",
             base != NULL ? base : "/tmp");
    return mkdtemp(folder) == NULL ? -1 : chdir(folder);
}

static unsigned count_files(void)
{
    DIR *dir = opendir(".");
    unsigned n = 0;

    while (readdir(dir) != NULL) {
        n++;
    }
    closedir(dir);
    return n - 2;
}

static int leave_folder(void **state)
{
    (void)state;
    unlink("a");
    unlink("b");
    return chdir("/") == 0 ? rmdir(folder) : -1;
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void expect_content(const char *path, const char *text)
{
    char content[64] = "";
    FILE *f = fopen(path, "r");

    assert_non_null(f);
    assert_int_equal(fread(content, 1, sizeof(content) - 1, f),
                     strlen(text));
    fclose(f);
    assert_string_equal(content, text);
}

static void test_commit_makes_the_name(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_create("a", 0, &err);

    (void)state;
    assert_non_null(out);
    assert_int_equal(qlb_outfile_write(out, "abc", 3, &err), 0);
    assert_int_equal(qlb_outfile_position(out), 3);
    assert_int_equal(access("a", F_OK), -1);
    assert_int_equal(count_files(), 1);
    assert_false(qlb_outfile_is_committed(out));
    assert_int_equal(qlb_outfile_commit(out, &err), 0);
    assert_true(qlb_outfile_is_committed(out));
    qlb_outfile_close(out);
    expect_content("a", "abc");
    assert_int_equal(count_files(), 1);
    unlink("a");
}

static void test_close_without_commit_leaves_nothing(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out;

    (void)state;
    put("a", "old");
    out = qlb_outfile_create("a", QLB_OUTFILE_FORCE, &err);
    assert_non_null(out);
    assert_int_equal(qlb_outfile_write(out, "new", 3, &err), 0);
    qlb_outfile_close(out);
    expect_content("a", "old");
    assert_int_equal(count_files(), 1);
    unlink("a");
}

static void test_existing_names_are_kept(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out;

    (void)state;
    put("a", "old");
    assert_null(qlb_outfile_create("a", 0, &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    assert_string_equal(err.message,
                        "a: already exists; --force replaces it");

    /* A name that appears while we write is not replaced, either. */
    out = qlb_outfile_create("b", 0, &err);
    assert_non_null(out);
    put("b", "theirs");
    assert_int_equal(qlb_outfile_commit(out, &err), -1);
    assert_string_equal(err.message, "b: File exists");
    qlb_outfile_close(out);
    expect_content("b", "theirs");
    assert_int_equal(count_files(), 2);
    unlink("a");
    unlink("b");
}

static void test_force_replaces_the_target_of_a_link(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out;
    struct stat st;

    (void)state;
    put("a", "old");
    assert_int_equal(symlink("a", "b"), 0);
    out = qlb_outfile_create("b", QLB_OUTFILE_FORCE, &err);
    assert_non_null(out);
    assert_int_equal(qlb_outfile_write(out, "new", 3, &err), 0);
    assert_int_equal(qlb_outfile_commit(out, &err), 0);
    qlb_outfile_close(out);
    expect_content("a", "new");
    assert_int_equal(lstat("b", &st), 0);
    assert_true(S_ISLNK(st.st_mode));
    unlink("a");
    unlink("b");
}

static void test_force_keeps_the_permissions(void **state)
{
    static const mode_t modes[] = { 0600, 0640, 0644, 0666 };
    mode_t mask = umask(022);
    struct qlb_error err;
    struct stat st;

    (void)state;
    for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); i++) {
        struct qlb_outfile *out;

        put("a", "old");
        assert_int_equal(chmod("a", modes[i]), 0);
        out = qlb_outfile_create("a", QLB_OUTFILE_FORCE, &err);
        assert_non_null(out);
        assert_int_equal(qlb_outfile_commit(out, &err), 0);
        qlb_outfile_close(out);
        assert_int_equal(stat("a", &st), 0);
        assert_int_equal(st.st_mode & 07777, modes[i]);
    }
    unlink("a");
    umask(mask);
}

static void test_abandon_removes_temporary_files(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_create("a", 0, &err);

    (void)state;
    assert_int_equal(count_files(), 1);
    qlb_outfile_abandon_all();
    assert_int_equal(count_files(), 0);
    qlb_outfile_close(out);
}

static void test_zero(void **state)
{
    struct qlb_error err;
    struct qlb_outfile *out = qlb_outfile_create("a", 0, &err);

    (void)state;
    assert_int_equal(qlb_outfile_write(out, "abcdef", 6, &err), 0);
    assert_int_equal(qlb_outfile_zero(out, 1, 3, &err), 0);
    assert_int_equal(qlb_outfile_pwrite(out, "xyz", 3, 1, &err), 0);
    assert_int_equal(qlb_outfile_truncate(out, 4, &err), 0);
    assert_int_equal(qlb_outfile_commit(out, &err), 0);
    qlb_outfile_close(out);
    expect_content("a", "axyz");
    unlink("a");
}

static void test_short_files(void **state)
{
    struct qlb_error err;
    struct qlb_blkio *io;
    char data[8] = "xxxxxxx";

    (void)state;
    put("a", "abc");
    io = qlb_blkio_open("a", 0, &err);
    assert_non_null(io);
    assert_int_equal(io->size, 3);
    assert_int_equal(qlb_blkio_read(io, data, 4, 0, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_string_equal(err.message,
                        "a: ends at 3, before the 4 bytes at offset 0");
    assert_int_equal(qlb_blkio_read_padded(io, data, 5, 1, &err), 0);
    assert_memory_equal(data, "bc\0\0\0xx", 7);
    assert_int_equal(qlb_blkio_write(io, "z", 1, 0, &err), -1);
    qlb_blkio_close(io);
    assert_null(qlb_blkio_open(".", 0, &err));
    assert_null(qlb_blkio_open("missing", 0, &err));
    assert_string_equal(err.message, "missing: No such file or directory");
    unlink("a");
}

static int try_open(unsigned flags, struct qlb_error *err)
{
    struct qlb_blkio *io = qlb_blkio_open("a", flags, err);

    if (io == NULL) {
        return -1;
    }
    qlb_blkio_close(io);
    return 0;
}

static void test_locks(void **state)
{
    const unsigned reader = QLB_BLKIO_LOCK;
    const unsigned writer = QLB_BLKIO_LOCK | QLB_BLKIO_WRITE;
    struct qlb_error err;
    struct qlb_blkio *io;

    (void)state;
    put("a", "abc");
    io = qlb_blkio_open("a", reader, &err);
    assert_non_null(io);
    assert_int_equal(try_open(reader, &err), 0);
    assert_int_equal(try_open(writer, &err), -1);
    assert_int_equal(err.code, QLB_E_BUSY);
    assert_string_equal(err.message,
                        "a: the image is in use by another process");
    qlb_blkio_close(io);

    io = qlb_blkio_open("a", writer, &err);
    assert_non_null(io);
    assert_int_equal(try_open(writer, &err), -1);
    assert_int_equal(err.code, QLB_E_BUSY);
    assert_int_equal(try_open(reader, &err), -1);
    assert_int_equal(err.code, QLB_E_BUSY);
    assert_int_equal(try_open(0, &err), 0);
    qlb_blkio_close(io);
    assert_int_equal(try_open(writer, &err), 0);
    unlink("a");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_commit_makes_the_name),
        cmocka_unit_test(test_close_without_commit_leaves_nothing),
        cmocka_unit_test(test_existing_names_are_kept),
        cmocka_unit_test(test_force_replaces_the_target_of_a_link),
        cmocka_unit_test(test_force_keeps_the_permissions),
        cmocka_unit_test(test_abandon_removes_temporary_files),
        cmocka_unit_test(test_zero),
        cmocka_unit_test(test_short_files),
        cmocka_unit_test(test_locks),
    };

    return cmocka_run_group_tests_name("files", tests, enter_folder,
                                       leave_folder);
}
