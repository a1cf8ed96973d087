/* Repositories of lbvm: manifests, objects, locks, chains, leftovers.
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
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "vm/repository.h"

static char folder[4096];
static struct qlb_error err;

/* Each test has a folder of its own and works in it. */
static int enter_folder(void **state)
{
    const char *base = getenv("TMPDIR");

    (void)state;
    snprintf(folder, sizeof(folder), "%s/test_repository.XXXXXX",
             base != NULL ? base : "/tmp");
    return mkdtemp(folder) == NULL ? -1 : chdir(folder);
}

static int leave_folder(void **state)
{
    char command[8300];

    (void)state;
    snprintf(command, sizeof(command), "chmod -R u+w '%s'; rm -rf '%s'",
             folder, folder);
    return chdir("/") == 0 ? system(command) : -1;
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static bool exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static void expect_error(enum qlb_code code, const char *message)
{
    assert_string_equal(err.message, message);
    assert_int_equal(err.code, code);
}

/* A UUID of one byte repeated. */
static struct qlb_uuid uuid_of(uint8_t byte)
{
    struct qlb_uuid uuid;

    memset(&uuid, byte, sizeof(uuid));
    return uuid;
}

/* A backup of one disk: checkpoint and parent are bytes as above. */
static struct manifest *make_manifest(uint64_t time, uint8_t checkpoint,
                                      uint8_t parent)
{
    struct manifest *m = manifest_new();
    char id[MANIFEST_ID_SIZE], uuid[QLB_UUID_TEXT];
    struct manifest_disk *disk = manifest_add_disk(m);

    m->set = uuid_of(checkpoint);
    m->id = strdup(manifest_make_id(time, &m->set, id));
    m->machine = strdup("web1");
    m->time = time;
    m->finished = time + 5;
    m->sequence = time;
    m->label = strdup("main");
    m->source = strdup("images");
    disk->name = strdup("vda");
    disk->filename = strdup("/images/vda.qcow2");
    disk->checkpoint = uuid_of(checkpoint);
    if (parent != 0) {
        disk->parent = uuid_of(parent);
    }
    disk->image = uuid_of(0xee);
    disk->size = 1 << 20;
    disk->bytes = 1234;
    assert_true(asprintf(&disk->archive, "archives/vda.%s-0.lbz",
                         qlb_uuid_format(&disk->checkpoint, uuid)) > 0);
    disk->digest = strdup("xxh3-128");
    disk->root = strdup("0123456789abcdef0123456789abcdef");
    disk->reason = strdup("");
    return m;
}

static struct machine *open_web1(struct repository **repository)
{
    struct machine *machine;

    *repository = repository_open("repo", true, "main", &err);
    assert_non_null(*repository);
    machine = machine_open(*repository, "web1", true, &err);
    assert_non_null(machine);
    return machine;
}

/* With its archive. */
static void add_backup(struct machine *machine, uint64_t time,
                       uint8_t checkpoint, uint8_t parent)
{
    struct manifest *m = make_manifest(time, checkpoint, parent);

    assert_int_equal(machine_put(machine, m->disks[0].archive, "x", 1, &err),
                     0);
    assert_int_equal(machine_put_manifest(machine, m, &err), 0);
    manifest_free(m);
}

static void close_both(struct machine *machine, struct repository *repository)
{
    machine_close(machine);
    repository_close(repository);
}

/* ---- manifests ---- */

static void test_ids(void **state)
{
    const struct qlb_uuid set = { { 0x1a, 0x2b, 0x3c, 0x4d, 0x55 } };
    char id[MANIFEST_ID_SIZE];

    (void)state;
    assert_string_equal(manifest_make_id(1795443178, &set, id),
                        "20261123T141258Z-1a2b3c4d");
    assert_string_equal(manifest_make_id(0, &set, id),
                        "19700101T000000Z-1a2b3c4d");
    assert_string_equal(manifest_make_id(UINT64_MAX, &set, id),
                        "99991231T235959Z-1a2b3c4d");
}

static void test_manifests_come_back(void **state)
{
    struct manifest *m = make_manifest(1795443178, 1, 2), *back;
    struct manifest_disk *second = manifest_add_disk(m);
    json_t *json, *again;

    (void)state;
    second->name = strdup("vdb");
    second->filename = strdup("");
    second->checkpoint = uuid_of(9);
    second->image = uuid_of(8);
    second->archive = strdup("archives/b.lbz");
    second->digest = strdup("sha256");
    second->root = strdup("0123456789abcdef0123456789abcdef"
                          "0123456789abcdef0123456789abcdef");
    second->reason = strdup("a new disk");
    second->bitmap = strdup("lbvm-1");
    m->quiesced = true;
    m->definition = strdup("definitions/x.xml");
    m->kept_for = strdup("others");
    json = manifest_to_json(m);
    back = manifest_from_json(json, &err);
    assert_non_null(back);
    again = manifest_to_json(back);
    assert_true(json_equal(json, again));
    assert_int_equal(back->n_disks, 2);
    assert_true(qlb_uuid_is_zero(&back->disks[1].parent));
    assert_true(qlb_uuid_equal(&back->disks[0].parent,
                               &m->disks[0].parent));
    assert_ptr_equal(manifest_find_disk(back, "vdb"), &back->disks[1]);
    assert_null(manifest_find_disk(back, "vdc"));
    assert_string_equal(back->kept_for, "others");
    manifest_free(back);
    manifest_free(m);
    json_decref(json);
    json_decref(again);
}

/* What is read by people alone never stops a backup. */
static void test_odd_file_names_are_written_readably(void **state)
{
    struct manifest *m = make_manifest(1795443178, 1, 0), *back;
    json_t *json;

    (void)state;
    free(m->disks[0].filename);
    m->disks[0].filename = strdup("/a\xff\n/b");
    json = manifest_to_json(m);
    back = manifest_from_json(json, &err);
    assert_non_null(back);
    assert_string_equal(back->disks[0].filename, "/a?" "?/b");
    manifest_free(back);
    manifest_free(m);
    json_decref(json);
}

/* Sets a key of the manifest (disk: of its first disk) to the value, a JSON
 * text, NULL to delete it. */
static void expect_refused(bool disk, const char *key, const char *value,
                           enum qlb_code code, const char *message)
{
    struct manifest *m = make_manifest(1795443178, 1, 2);
    json_t *json = manifest_to_json(m);
    json_t *object = disk ? json_array_get(json_object_get(json, "disks"), 0)
                          : json;

    if (value == NULL) {
        assert_int_equal(json_object_del(object, key), 0);
    } else {
        json_object_set_new(object, key,
                            json_loads(value, JSON_DECODE_ANY, NULL));
    }
    manifest_free(m);
    m = manifest_from_json(json, &err);
    json_decref(json);
    assert_null(m);
    expect_error(code, message);
}

static void test_hostile_manifests(void **state)
{
    static const char *const texts[] = { "id", "machine", "label", "source" };
    char message[200];

    (void)state;
    for (unsigned i = 0; i < 4; i++) {
        snprintf(message, sizeof(message), "'%s' is missing, or no text of "
                 "one line", texts[i]);
        expect_refused(false, texts[i], NULL, QLB_E_DAMAGED, message);
        expect_refused(false, texts[i], "7", QLB_E_DAMAGED, message);
        expect_refused(false, texts[i], "\"a\\nb\"", QLB_E_DAMAGED, message);
    }
    expect_refused(false, "machine", "\"\"", QLB_E_DAMAGED,
                   "'machine' is empty");
    expect_refused(false, "format", "\"x\"", QLB_E_DAMAGED,
                   "is no manifest: 'format' is not 'lbvm-backup'");
    expect_refused(false, "version", "\"1\"", QLB_E_DAMAGED,
                   "'version' is missing, or no number");
    expect_refused(false, "version", "2", QLB_E_RUNTIME,
                   "version 2 is not known here; a newer lbvm may read it");
    expect_refused(false, "set", "\"x\"", QLB_E_DAMAGED,
                   "'set' is missing, or no UUID");
    expect_refused(false, "time", "-1", QLB_E_DAMAGED,
                   "'time' is missing, or no number in its range");
    expect_refused(false, "time", "253402300800", QLB_E_DAMAGED,
                   "'time' is missing, or no number in its range");
    expect_refused(false, "time", "1.5", QLB_E_DAMAGED,
                   "'time' is missing, or no number in its range");
    expect_refused(false, "time", "1795443179", QLB_E_DAMAGED,
                   "'id' is not that of 'time' and 'set', "
                   "20261123T141259Z-01010101");
    expect_refused(false, "id", "\"../../etc/passwd\"", QLB_E_DAMAGED,
                   "'id' is not that of 'time' and 'set', "
                   "20261123T141258Z-01010101");
    expect_refused(false, "label", "\"a b\"", QLB_E_DAMAGED,
                   "'label' is no chain label");
    expect_refused(false, "quiesced", "1", QLB_E_DAMAGED,
                   "'quiesced' is missing, or neither true nor false");
    expect_refused(false, "definition", "\"/etc/passwd\"", QLB_E_DAMAGED,
                   "'definition' is no file of the machine's folder "
                   "'definitions'");
    expect_refused(false, "kept_for", "[]", QLB_E_DAMAGED,
                   "'kept_for' is missing, or no text of one line");
    expect_refused(false, "disks", "[]", QLB_E_DAMAGED,
                   "'disks' is missing, or no list of 1 to 1024 disks");
    expect_refused(false, "disks", "{}", QLB_E_DAMAGED,
                   "'disks' is missing, or no list of 1 to 1024 disks");
    expect_refused(false, "disks", "[7]", QLB_E_DAMAGED,
                   "disk 0: 'name' is missing, or no text of one line");
}

static void test_hostile_disks(void **state)
{
    static const char *const outside[] = {
        "\"x.lbz\"", "\"../web2/archives/x.lbz\"", "\"/etc/passwd\"",
        "\"archives/../backups/x.json\"", "\"archives/\"", "\"archives/.x\"",
        "\"archives/..\"", "\"archives/a/b\"", "\"archivesx/b\"",
    };

    (void)state;
    for (unsigned i = 0; i < sizeof(outside) / sizeof(outside[0]); i++) {
        expect_refused(true, "archive", outside[i], QLB_E_DAMAGED,
                       "disk 'vda': 'archive' is no file of the machine's "
                       "folder 'archives'");
    }
    expect_refused(true, "name", "\"\"", QLB_E_DAMAGED,
                   "disk 0: 'name' is empty");
    expect_refused(true, "checkpoint", "null", QLB_E_DAMAGED,
                   "disk 'vda': 'checkpoint' is missing, or no UUID");
    expect_refused(true, "checkpoint",
                   "\"00000000-0000-0000-0000-000000000000\"", QLB_E_DAMAGED,
                   "disk 'vda': 'checkpoint' is missing, or no UUID");
    expect_refused(true, "parent", NULL, QLB_E_DAMAGED,
                   "disk 'vda': 'parent' is missing, or no UUID");
    expect_refused(true, "parent",
                   "\"01010101-0101-0101-0101-010101010101\"", QLB_E_DAMAGED,
                   "disk 'vda': it is its own parent");
    expect_refused(true, "size", "-1", QLB_E_DAMAGED,
                   "disk 'vda': 'size' is missing, or no number in its "
                   "range");
    expect_refused(true, "bytes", "\"5\"", QLB_E_DAMAGED,
                   "disk 'vda': 'bytes' is missing, or no number in its "
                   "range");
    expect_refused(true, "digest", "\"md5\"", QLB_E_DAMAGED,
                   "disk 'vda': 'digest' is neither xxh3-128 nor sha256");
    expect_refused(true, "digest", "\"sha256\"", QLB_E_DAMAGED,
                   "disk 'vda': 'root' is no digest");
    expect_refused(true, "root", "\"0123456789ABCDEF0123456789abcdef\"",
                   QLB_E_DAMAGED, "disk 'vda': 'root' is no digest");
}

static void test_two_disks_of_one_name(void **state)
{
    struct manifest *m = make_manifest(1795443178, 1, 2);
    json_t *json = manifest_to_json(m);
    json_t *disks = json_object_get(json, "disks");

    (void)state;
    json_array_append(disks, json_array_get(disks, 0));
    assert_null(manifest_from_json(json, &err));
    expect_error(QLB_E_DAMAGED, "there are two disks 'vda'");
    json_decref(json);
    manifest_free(m);
}

/* ---- the repository ---- */

static void test_a_repository_is_made_once(void **state)
{
    struct repository *r;
    char label[32];

    (void)state;
    assert_null(repository_open("repo", false, NULL, &err));
    expect_error(QLB_E_RUNTIME,
                 "repo: is no repository: it has no repository.json");
    assert_false(exists("repo"));
    r = repository_open("repo", true, NULL, &err);
    assert_non_null(r);
    assert_string_equal(repository_store(r)->name, "repo");
    snprintf(label, sizeof(label), "%s", repository_label(r));
    assert_int_equal(strncmp(label, "lbvm-", 5), 0);
    assert_int_equal(strlen(label), 13);
    repository_close(r);
    r = repository_open("repo", true, NULL, &err);
    assert_string_equal(repository_label(r), label);
    repository_close(r);
    r = repository_open("repo", false, label, &err);
    assert_non_null(r);
    repository_close(r);
    assert_null(repository_open("repo", true, "other", &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    repository_close(NULL);
}

static void test_only_an_empty_folder_becomes_one(void **state)
{
    struct repository *r;

    (void)state;
    assert_int_equal(mkdir("repo", 0700), 0);
    put("repo/thesis.txt", "");
    assert_null(repository_open("repo", true, NULL, &err));
    expect_error(QLB_E_USAGE, "repo: is no repository, and not empty: a new "
                 "one wants a folder of its own");
    unlink("repo/thesis.txt");
    /* of a new file system, and of a process that was killed here */
    assert_int_equal(mkdir("repo/lost+found", 0700), 0);
    put("repo/.repository.json.aB3xYz.tmp", "{");
    r = repository_open("repo", true, "weekly", &err);
    assert_non_null(r);
    assert_string_equal(repository_label(r), "weekly");
    repository_close(r);
    assert_null(repository_open("r2", true, "no label", &err));
    assert_int_equal(err.code, QLB_E_USAGE);
    put("file", "");
    assert_null(repository_open("file", true, NULL, &err));
    expect_error(QLB_E_RUNTIME, "file/repository.json: Not a directory");
}

static void test_hostile_repositories(void **state)
{
    static const struct {
        const char *text;
        enum qlb_code code;
        const char *message;
    } cases[] = {
        { "", QLB_E_DAMAGED, NULL },
        { "[]", QLB_E_DAMAGED,
          "repo/repository.json: does not describe a repository" },
        { "{\"format\": \"lbvm-repository\", \"version\": 2}", QLB_E_RUNTIME,
          "repo/repository.json: version 2 is not known here; a newer lbvm "
          "may read it" },
        { "{\"format\": \"lbvm-repository\", \"version\": 1}", QLB_E_DAMAGED,
          "repo/repository.json: 'label' is no chain label" },
        { "{\"format\": \"lbvm-repository\", \"version\": 1, "
          "\"label\": \"a\"}", QLB_E_DAMAGED,
          "repo/repository.json: 'uuid' is no UUID" },
    };

    (void)state;
    assert_int_equal(mkdir("repo", 0700), 0);
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        put("repo/repository.json", cases[i].text);
        assert_null(repository_open("repo", true, NULL, &err));
        assert_int_equal(err.code, cases[i].code);
        if (cases[i].message != NULL) {
            assert_string_equal(err.message, cases[i].message);
        }
    }
}

static void test_machines(void **state)
{
    static const char *const bad[] = { "", ".", "..", ".x", "-x", "a/b",
                                       "a b", "\xc3\xa4" };
    struct repository *r = repository_open("repo", true, NULL, &err);
    char **names, name[102];
    unsigned n;

    (void)state;
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        assert_null(machine_open(r, bad[i], true, &err));
        assert_int_equal(err.code, QLB_E_USAGE);
    }
    memset(name, 'x', 101);
    name[101] = '\0';
    assert_null(machine_open(r, name, true, &err));
    name[100] = '\0';
    machine_close(machine_open(r, name, true, &err));
    assert_null(machine_open(r, "web1", false, &err));
    expect_error(QLB_E_RUNTIME, "repo: has no backups of a machine 'web1'");
    machine_close(machine_open(r, "web1", true, &err));
    machine_close(machine_open(r, "db", true, &err));
    assert_int_equal(mkdir("repo/unrelated", 0700), 0);
    assert_int_equal(repository_machines(r, &names, &n, &err), 0);
    assert_int_equal(n, 3);
    assert_string_equal(names[0], "db");
    assert_string_equal(names[1], "web1");
    assert_string_equal(names[2], name);
    for (unsigned i = 0; i < n; i++) {
        free(names[i]);
    }
    free(names);
    repository_close(r);
}

/* ---- what manifests tell ---- */

static void test_finding_backups(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct manifest *kept;

    (void)state;
    assert_int_equal(machine_load(m, &err), 0);
    assert_null(machine_find(m, "latest", &err));
    expect_error(QLB_E_RUNTIME, "repo/web1: has no backup");
    assert_null(machine_find_at(m, 5, &err));
    expect_error(QLB_E_RUNTIME, "repo/web1: has no backup");
    add_backup(m, 1795443178, 2, 1);
    add_backup(m, 1795400000, 1, 0);
    kept = make_manifest(1795450000, 3, 2);
    kept->kept_for = strdup("others");
    assert_int_equal(machine_put_manifest(m, kept, &err), 0);
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(machine_n_backups(m), 3);
    assert_int_equal(machine_backup(m, 0)->time, 1795400000);
    assert_int_equal(machine_backup(m, 2)->time, 1795450000);
    assert_ptr_equal(machine_find(m, "latest", &err), machine_backup(m, 1));
    assert_ptr_equal(machine_find(m, "20261123T141", &err),
                     machine_backup(m, 1));
    assert_ptr_equal(machine_find(m, "20261123T141258Z-02020202", &err),
                     machine_backup(m, 1));
    assert_null(machine_find(m, kept->id, &err));
    assert_null(machine_find(m, "", &err));
    assert_null(machine_find(m, "2027", &err));
    expect_error(QLB_E_RUNTIME, "repo/web1: has no backup '2027'; 'lbvm "
                 "list' shows them");
    assert_null(machine_find(m, "2026", &err));
    expect_error(QLB_E_RUNTIME, "repo/web1: several backups begin with "
                 "'2026': 20261123T021320Z-01010101, "
                 "20261123T141258Z-02020202");
    assert_ptr_equal(machine_find_at(m, 1795443177, &err),
                     machine_backup(m, 0));
    assert_ptr_equal(machine_find_at(m, 1795443178, &err),
                     machine_backup(m, 1));
    assert_ptr_equal(machine_find_at(m, UINT64_MAX, &err),
                     machine_backup(m, 1));
    assert_null(machine_find_at(m, 1795399999, &err));
    expect_error(QLB_E_RUNTIME, "repo/web1: has no backup of "
                 "2026-11-23T02:13:19Z or before it");
    manifest_free(kept);
    close_both(m, r);
}

static void expect_chain(struct machine *m, unsigned backup,
                         const char *const *wanted, unsigned n_wanted)
{
    struct store_names objects;

    assert_int_equal(machine_chain(m, &machine_backup(m, backup)->disks[0],
                                   &objects, &err), 0);
    assert_int_equal(objects.n, n_wanted);
    for (unsigned i = 0; i < objects.n; i++) {
        char *path = machine_fetch(m, objects.at[i], &err);

        assert_string_equal(path, wanted[i]);
        free(path);
    }
    store_names_release(&objects);
}

#define ARCHIVE(d)                                                            \
    "repo/web1/archives/vda." d d d d "-" d d "-" d d "-" d d "-" d d d d d d \
    "-0.lbz"

static void test_chains(void **state)
{
    static const char *const wanted[] = {
        ARCHIVE("01"), ARCHIVE("02"), ARCHIVE("03"),
    };
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct qlb_uuid image = uuid_of(0xee), checkpoint = uuid_of(3);
    struct store_names objects;

    (void)state;
    /* the clock went back between 2 and 3 */
    add_backup(m, 1000, 1, 0);
    add_backup(m, 3000, 2, 1);
    add_backup(m, 2000, 3, 2);
    add_backup(m, 4000, 5, 4);
    assert_int_equal(machine_load(m, &err), 0);
    expect_chain(m, 0, wanted, 1);
    expect_chain(m, 1, wanted, 3);
    expect_chain(m, 2, wanted, 2);
    assert_ptr_equal(machine_find_archive(m, &image, &checkpoint),
                     &machine_backup(m, 1)->disks[0]);
    assert_null(machine_find_archive(m, &checkpoint, &image));
    assert_int_equal(machine_chain(m, &machine_backup(m, 3)->disks[0],
                                   &objects, &err), -1);
    expect_error(QLB_E_UNTRUSTED, "repo/web1: disk 'vda': the chain is "
                 "broken: the parent 04040404-0404-0404-0404-040404040404 of "
                 "archives/vda.05050505-0505-0505-0505-050505050505-0.lbz is "
                 "in no backup");
    assert_int_equal(unlink(wanted[1]), 0);
    assert_int_equal(machine_chain(m, &machine_backup(m, 1)->disks[0],
                                   &objects, &err), -1);
    expect_error(QLB_E_UNTRUSTED, ARCHIVE("02") ": is missing: the chain of "
                 "disk 'vda' is broken");
    close_both(m, r);
}

static void test_a_circle_of_parents(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct store_names objects;

    (void)state;
    add_backup(m, 1000, 1, 2);
    add_backup(m, 2000, 2, 1);
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(machine_chain(m, &machine_backup(m, 0)->disks[0],
                                   &objects, &err), -1);
    expect_error(QLB_E_DAMAGED, "repo/web1: disk 'vda': the parents of its "
                 "archives run in a circle");
    close_both(m, r);
}

static void test_bad_manifests_stop_everything(void **state)
{
    static const char first[] = "repo/web1/backups/"
                                "19700101T001640Z-01010101.json";
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct manifest *other = make_manifest(2000, 1, 0);

    (void)state;
    assert_int_equal(machine_lock(m, MACHINE_BACKUP, &err), 0);
    add_backup(m, 1000, 1, 0);
    put("repo/web1/backups/README", "not looked at");
    put("repo/web1/backups/.x.json.aB3xYz.tmp", "not looked at");
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(rename(first, "repo/web1/backups/x.json"), 0);
    assert_int_equal(machine_load(m, &err), -1);
    expect_error(QLB_E_DAMAGED, "repo/web1/backups/x.json: 'id' is "
                 "'19700101T001640Z-01010101', which the file's name is not");
    assert_int_equal(machine_sweep(m, NULL, &err), -1);
    assert_true(exists(ARCHIVE("01")));
    put("repo/web1/backups/x.json", "{\"a\": 1, \"a\": 2}");
    assert_int_equal(machine_load(m, &err), -1);
    assert_int_equal(err.code, QLB_E_DAMAGED);
    assert_int_equal(machine_n_backups(m), 0);
    unlink("repo/web1/backups/x.json");
    add_backup(m, 1000, 1, 0);
    free(other->disks[0].archive);
    other->disks[0].archive = strdup("archives/other.lbz");
    assert_int_equal(machine_put_manifest(m, other, &err), 0);
    assert_int_equal(machine_load(m, &err), -1);
    expect_error(QLB_E_DAMAGED, "repo/web1: "
                 "archives/vda.01010101-0101-0101-0101-010101010101-0.lbz "
                 "and archives/other.lbz have the same checkpoint");
    other->disks[0].checkpoint = uuid_of(2);
    free(other->disks[0].archive);
    other->disks[0].archive = strdup("archives/vda.01010101-0101-0101-0101-"
                                     "010101010101-0.lbz");
    assert_int_equal(machine_put_manifest(m, other, &err), 0);
    assert_int_equal(machine_load(m, &err), -1);
    expect_error(QLB_E_DAMAGED, "repo/web1: two backups or disks name "
                 "archives/vda.01010101-0101-0101-0101-010101010101-0.lbz as "
                 "theirs");
    manifest_free(other);
    close_both(m, r);
}

static void test_a_machine_that_was_renamed(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);

    (void)state;
    add_backup(m, 1000, 1, 0);
    machine_close(m);
    assert_int_equal(rename("repo/web1", "repo/web2"), 0);
    m = machine_open(r, "web2", false, &err);
    assert_int_equal(machine_load(m, &err), -1);
    expect_error(QLB_E_DAMAGED,
                 "repo/web2/backups/19700101T001640Z-01010101.json: "
                 "'machine' is 'web1', which the folder's name is not");
    close_both(m, r);
}

/* ---- objects ---- */

static void expect_object(struct machine *m, const char *disk,
                          const char *wanted)
{
    struct qlb_uuid uuid = uuid_of(1);
    char *object = machine_archive_object(m, disk, &uuid, &err);

    assert_non_null(object);
    assert_string_equal(object, wanted);
    free(object);
}

#define UUID1 "01010101-0101-0101-0101-010101010101"

static void test_names_of_archives(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);

    (void)state;
    expect_object(m, "vda", "archives/vda." UUID1 "-0.lbz");
    put("repo/web1/archives/vda." UUID1 "-0.lbz", "");
    expect_object(m, "vda", "archives/vda." UUID1 "-1.lbz");
    assert_int_equal(symlink("/nowhere", "repo/web1/archives/vda." UUID1
                             "-1.lbz"), 0);
    expect_object(m, "vda", "archives/vda." UUID1 "-2.lbz");
    expect_object(m, "../a b", "archives/_._a_b." UUID1 "-0.lbz");
    expect_object(m, "-a\xc3\xa4", "archives/_a__." UUID1 "-0.lbz");
    expect_object(m, "0123456789012345678901234567890123456789"
                     "01234567890123456789long",
                  "archives/0123456789012345678901234567890123456789"
                  "01234567890123456789." UUID1 "-0.lbz");
    close_both(m, r);
}

static void test_a_manifest_that_nobody_could_read_is_not_written(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct manifest *bad = make_manifest(1000, 1, 0);

    (void)state;
    free(bad->disks[0].root);
    bad->disks[0].root = strdup("x");
    assert_int_equal(machine_put_manifest(m, bad, &err), -1);
    expect_error(QLB_E_DAMAGED,
                 "repo/web1/backups/19700101T001640Z-01010101.json: can't be "
                 "written: disk 'vda': 'root' is no digest");
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(machine_n_backups(m), 0);
    manifest_free(bad);
    close_both(m, r);
}

static void test_deleting(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);

    (void)state;
    add_backup(m, 1000, 1, 0);
    assert_int_equal(machine_delete(m, "backups/19700101T001640Z-"
                                    "01010101.json", &err), 0);
    /* and once more, after a crash */
    assert_int_equal(machine_delete(m, "backups/19700101T001640Z-"
                                    "01010101.json", &err), 0);
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(machine_n_backups(m), 0);
    assert_int_equal(mkdir("repo/web1/archives/d", 0700), 0);
    assert_int_equal(machine_delete(m, "archives/d", &err), 0);
    assert_true(exists("repo/web1/archives/d")); /* a folder is no object */
    close_both(m, r);
}

static void test_leftovers(void **state)
{
    static const char *const stay[] = {
        ARCHIVE("01"), "repo/web1/archives/README",
        "repo/web1/archives/.nfs000001", "repo/web1/archives/.x.lbz",
        "repo/web1/definitions/a.xml", "repo/web1/definitions/notes",
        "repo/web1/backups/README", "repo/web1/lock", "repo/web1/backup.lock",
        "repo/web1/.verified.json.aB3xYz.tmp",
    };
    static const char *const go[] = {
        "repo/web1/archives/old.lbz", "repo/web1/archives/.a.lbz.aB3xYz.tmp",
        "repo/web1/definitions/b.xml", "repo/web1/definitions/b.json",
        "repo/web1/definitions/.b.json.aB3xYz.tmp",
        "repo/web1/backups/.b.json.aB3xYz.tmp",
    };
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct manifest *b = make_manifest(1000, 1, 0);
    unsigned n;

    (void)state;
    for (unsigned i = 0; i < 10; i++) {
        put(stay[i], "");
    }
    for (unsigned i = 0; i < 6; i++) {
        put(go[i], "");
    }
    b->definition = strdup("definitions/a.xml");
    assert_int_equal(machine_put_manifest(m, b, &err), 0);
    assert_int_equal(machine_load(m, &err), 0);
    assert_int_equal(machine_sweep(m, NULL, &err), -1);
    expect_error(QLB_E_RUNTIME, "repo/web1: leftovers are not deleted "
                 "without the lock and the manifests");
    assert_int_equal(machine_lock(m, MACHINE_BACKUP, &err), 0);
    assert_int_equal(machine_sweep(m, &n, &err), 0);
    assert_int_equal(n, 6);
    for (unsigned i = 0; i < 10; i++) {
        assert_true(exists(stay[i]));
    }
    for (unsigned i = 0; i < 6; i++) {
        assert_false(exists(go[i]));
    }
    assert_int_equal(machine_lock(m, MACHINE_PRUNE, &err), 0);
    assert_int_equal(machine_sweep(m, &n, &err), 0);
    assert_int_equal(n, 1);
    assert_false(exists(stay[9]));
    manifest_free(b);
    close_both(m, r);
}

/* ---- locks ---- */

/* Whether a second one gets the lock while the first is held. */
static void expect_locks(enum machine_lock held, enum machine_lock wanted,
                         const char *refusal)
{
    struct repository *r;
    struct machine *first = open_web1(&r), *second;
    char message[200];

    assert_int_equal(machine_lock(first, held, &err), 0);
    second = machine_open(r, "web1", false, &err);
    if (refusal == NULL) {
        assert_int_equal(machine_lock(second, wanted, &err), 0);
    } else {
        assert_int_equal(machine_lock(second, wanted, &err), -1);
        snprintf(message, sizeof(message), "repo/web1: %s (process %d); try "
                 "again when that has ended", refusal, (int)getpid());
        /* the process is told where the file system's devices are real */
        if (strstr(err.message, "(process") == NULL) {
            snprintf(message, sizeof(message), "repo/web1: %s; try again "
                     "when that has ended", refusal);
        }
        expect_error(QLB_E_BUSY, message);
    }
    machine_close(first);
    assert_int_equal(machine_lock(second, wanted, &err), 0);
    close_both(second, r);
}

static void test_locks(void **state)
{
    static const char adding[] = "a backup or a pruning of it is at work";
    static const char reading[] = "its archives are being read by another "
                                  "lbvm";

    (void)state;
    expect_locks(MACHINE_READ, MACHINE_READ, NULL);
    expect_locks(MACHINE_READ, MACHINE_BACKUP, NULL);
    expect_locks(MACHINE_READ, MACHINE_PRUNE, reading);
    expect_locks(MACHINE_BACKUP, MACHINE_READ, NULL);
    expect_locks(MACHINE_BACKUP, MACHINE_BACKUP, adding);
    expect_locks(MACHINE_BACKUP, MACHINE_PRUNE, adding);
    expect_locks(MACHINE_PRUNE, MACHINE_READ,
                 "a pruning of it is at work");
    expect_locks(MACHINE_PRUNE, MACHINE_BACKUP, adding);
    expect_locks(MACHINE_PRUNE, MACHINE_PRUNE, adding);
}

/* A folder that was written by something else, or copied. */
static void test_a_lock_file_that_exists_stays(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);
    struct stat before, after;

    (void)state;
    /* another process has not come further in making the machine */
    assert_int_equal(rmdir("repo/web1/backups"), 0);
    assert_int_equal(machine_lock(m, MACHINE_BACKUP, &err), 0);
    assert_int_equal(stat("repo/web1/backup.lock", &before), 0);
    machine_close(machine_open(r, "web1", true, &err));
    assert_true(exists("repo/web1/backups"));
    assert_int_equal(stat("repo/web1/backup.lock", &after), 0);
    assert_int_equal(before.st_ino, after.st_ino);
    close_both(m, r);
}

static void test_missing_lock_files_are_made(void **state)
{
    struct repository *r;
    struct machine *m = open_web1(&r);

    (void)state;
    unlink("repo/web1/lock");
    unlink("repo/web1/backup.lock");
    assert_int_equal(machine_lock(m, MACHINE_PRUNE, &err), 0);
    assert_true(exists("repo/web1/lock"));
    assert_true(exists("repo/web1/backup.lock"));
    close_both(m, r);
}

#define TEST(name)                                                            \
    cmocka_unit_test_setup_teardown(name, enter_folder, leave_folder)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_ids),
        TEST(test_manifests_come_back),
        TEST(test_odd_file_names_are_written_readably),
        TEST(test_hostile_manifests),
        TEST(test_hostile_disks),
        TEST(test_two_disks_of_one_name),
        TEST(test_a_repository_is_made_once),
        TEST(test_only_an_empty_folder_becomes_one),
        TEST(test_hostile_repositories),
        TEST(test_machines),
        TEST(test_finding_backups),
        TEST(test_chains),
        TEST(test_a_circle_of_parents),
        TEST(test_bad_manifests_stop_everything),
        TEST(test_a_machine_that_was_renamed),
        TEST(test_names_of_archives),
        TEST(test_a_manifest_that_nobody_could_read_is_not_written),
        TEST(test_deleting),
        TEST(test_leftovers),
        TEST(test_locks),
        TEST(test_a_lock_file_that_exists_stays),
        TEST(test_missing_lock_files_are_made),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
