# Gets QEMU, applies the series, builds: a part of ./setup, which sources it and
# has die, say, need, quietly and so on.
#
# What is made, in $qemu:
#
#   download/SUITE   a source package as apt verified it, with SHA256SUMS
#   source.git       its files (branch base), and a commit for each patch
#                    (branch series)
#   source, build    the work tree with the series, and its build
#   plain-source, plain-build
#                    the same without the series, only for what compares the two
#   core             our libqcow2lb-core, static, for the build
#   stage/bin, plain-stage/bin
#                    the programs
#   stock-10.0, stock-7.2
#                    the distribution's binary packages, unpacked
#
# Each has a file .setup-* that is written last and names what it was made from.
#
# Copyright (C) 2026 The qcow2 livebackup authors
# SPDX-License-Identifier: GPL-2.0-or-later

qemu=$build-qemu
qemu_patches=${QEMU_PATCHES:-$top/qemu-patches}

packages_qemu=(
    ninja-build python3 python3-venv flex bison bzip2 xz-utils git
    libglib2.0-dev libpixman-1-dev libgnutls28-dev liburing-dev libzstd-dev
    libaio-dev libfdt-dev libslirp-dev libcap-ng-dev libseccomp-dev
    libbz2-dev libfuse3-dev zlib1g-dev
    seabios qemu-system-data ipxe-qemu
)

# Nothing depends on which other libraries a machine happens to have.
qemu_configure=(
    --python=/usr/bin/python3
    --target-list=x86_64-softmmu
    --without-default-features
    --disable-download
    --disable-docs
    --disable-install-blobs
    --disable-debug-info
    --firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu
    --enable-system --enable-tools --enable-kvm --enable-tcg
    --enable-gnutls --enable-keyring --enable-seccomp --enable-cap-ng
    --enable-linux-io-uring --enable-linux-aio --enable-membarrier
    --enable-avx2 --enable-avx512bw
    --enable-zstd --enable-bzip2
    --enable-fuse --enable-fuse-lseek --enable-attr
    --enable-pixman --enable-slirp
    --enable-vhost-kernel --enable-vhost-net --enable-vhost-user
    --enable-vhost-user-blk-server
    --enable-bochs --enable-cloop --enable-dmg --enable-parallels
    --enable-qcow1 --enable-qed --enable-vdi --enable-vhdx --enable-vmdk
    --enable-vpc --enable-vvfat --enable-replication
)

qemu_targets=(
    qemu-img qemu-io qemu-nbd storage-daemon/qemu-storage-daemon
    qemu-system-x86_64
)

# Files that distributions take out of the tarball, and meson insists on.
qemu_stripped=(
    aarch64-code arm-code arm-vars i386-code i386-secure-code i386-vars
    loongarch64-code loongarch64-vars riscv-code riscv-vars
    x86_64-code x86_64-secure-code
)

# -------------------------------------------------------------------- series

# The file names of the patches, in their order.
series() {
    if [ -e "$qemu_patches/series" ]; then
        sed 's/[[:space:]]*#.*//; /^[[:space:]]*$/d' "$qemu_patches/series"
    fi
}

have_series() {
    [ -n "$(series)" ]
}

# base KEY: a value of the file BASE.
base() {
    awk -v key="$1" '$1 == key { print $2 }' "$qemu_patches/BASE"
}

# --------------------------------------------------- the distribution's archive

codename() {
    (. /etc/os-release && printf '%s\n' "${VERSION_CODENAME:-}")
}

# Where the source package comes from that is built here.
source_suite() {
    case $(codename) in
        bookworm) echo bookworm-backports ;;
        trixie) echo trixie ;;
        *) die "not Debian 12 or 13: name a tarball of QEMU in QEMU_SOURCE" ;;
    esac
}

# The entries of the machine's sources.list that have its own release, as
# stanzas without Types and Suites.
archive_entries() {
    local name
    name=$(codename)
    # The list of one line for each entry, as stanzas; options are in [].
    { cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list || true
    } 2>/dev/null |
        sed -n 's/^[[:space:]]*deb[[:space:]]\+//p' |
        awk -v name="$name" '
            {
                sub(/#.*/, "")
                key = ""
                if (match($0, /^\[[^]]*\]/)) {
                    n = split(substr($0, 2, RLENGTH - 2), option, " ")
                    $0 = substr($0, RLENGTH + 1)
                    for (i = 1; i <= n; i++) {
                        if (sub(/^signed-by=/, "", option[i])) {
                            key = option[i]
                        }
                    }
                }
                if ($2 != name) {
                    next
                }
                print "URIs: " $1
                line = "Components:"
                for (i = 3; i <= NF; i++) {
                    line = line " " $i
                }
                print line
                if (key != "") {
                    print "Signed-By: " key
                }
                print ""
            }'
    local file
    for file in /etc/apt/sources.list.d/*.sources; do
        if [ -e "$file" ]; then
            sed '/^#/d; s/^[[:space:]]*$//' "$file"
            echo
        fi
    done | awk -v name="$name" -v RS= '
        {
            wanted = 0
            kept = field = ""
            n = split($0, line, "\n")
            for (i = 1; i <= n; i++) {
                if (line[i] !~ /^[ \t]/) {
                    field = tolower(line[i])
                    sub(/[ \t]*:.*/, "", field)
                }
                text = " " line[i] " "
                gsub(/[ \t]+/, " ", text)
                if (field == "suites" && index(text, " " name " ")) {
                    wanted = 1
                }
                if (field == "enabled" && text ~ / no /) {
                    wanted = 0
                    break
                }
                if (field ~ /^(uris|components|signed-by|trusted)$/) {
                    kept = kept line[i] "\n"
                }
            }
            if (wanted) {
                print kept
            }
        }'
}

# open_archive DIR TYPES SUITES: let the apt of apt_in DIR see these suites of
# the mirror that the machine uses for its own. The machine's configuration and
# lists stay as they are.
open_archive() {
    local dir=$1 types=$2 suites=$3 entry
    mkdir -p "$dir"/{sources,lists/partial,cache/archives/partial}
    while IFS= read -r -d '' entry; do
        printf 'Types: %s\nSuites: %s\n%s\n' "$types" "$suites" "$entry" \
            >"$dir/sources/archive.sources"
        rm -rf "$dir"/lists/*_*
        # the lists of others may use the release's name too
        if apt_in "$dir" apt-get update >>"$dir/log" 2>&1 &&
                grep -q -s -E '^Origin: Debian( Backports)?$' \
                    "$dir"/lists/*Release; then
            return
        fi
    done < <(archive_entries | awk -v RS= '{ printf "%s%c", $0, 0 }')
    tail -n 20 "$dir/log" >&2 2>/dev/null || true
    die "no mirror in /etc/apt/sources.list* gives $suites"
}

# apt_in DIR COMMAND...: apt-get or apt-cache, perhaps with something before it,
# with DIR's sources and lists.
apt_in() {
    local dir=$1
    shift
    "$@" -q -o Dir::Etc::SourceList=/dev/null \
        -o Dir::Etc::SourceParts="$dir/sources" \
        -o Dir::State::Lists="$dir/lists" \
        -o Dir::Cache="$dir/cache" \
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= \
        -o APT::Sandbox::User=root </dev/null
}

# with_archive TYPES SUITES COMMAND ARGS...: call COMMAND DIR ARGS.... DIR does
# not survive it.
with_archive() (
    types=$1 suites=$2 command=$3
    shift 3
    dir=$(mktemp -d "$qemu/apt.XXXXXX")
    trap 'rm -rf "$dir" 2>/dev/null || as_root rm -rf "$dir"' EXIT
    open_archive "$dir" "$types" "$suites"
    "$command" "$dir" "$@"
)

# newest_version PREFIX: of the versions on standard input that begin with it.
newest_version() {
    awk -v prefix="$1" 'index($1, prefix) == 1 { print $1 }' | sort -V |
        tail -n 1
}

# The packaging (.dsc, .debian.tar.xz) is taken if it can be got: a mirror may
# have dropped it with a security update, while the tarball is shared.
download_source() {
    local dir=$1 suite=$2 version new=$qemu/download/$2.new
    version=$(apt_in "$dir" apt-cache showsrc --only-source qemu |
              awk '$1 == "Version:" { print $2 }' | newest_version 1:10.0.)
    [ -n "$version" ] || die "$suite has no source of QEMU 10.0"
    say "getting the source of qemu $version ($suite)"
    rm -rf "$new"
    mkdir -p "$new"
    (
        cd "$new"
        quietly "$new/.tar.log" apt_in "$dir" apt-get source --download-only \
            --tar-only "qemu=$version"
        apt_in "$dir" apt-get source --download-only "qemu=$version" \
            >.dsc.log 2>&1 || rm -f ./*.dsc ./*.debian.tar.*
        sha256sum qemu_* >SHA256SUMS
        printf '%s\n' "$version" >version
    )
    rm -rf "$qemu/download/$suite"
    mv "$new" "$qemu/download/$suite"
}

# get_source SUITE: into download/SUITE, unless it is there, and whole.
get_source() {
    local dir=$qemu/download/$1
    if [ ! -e "$dir/SHA256SUMS" ] ||
            ! (cd "$dir" && sha256sum --quiet -c SHA256SUMS >&2); then
        with_archive deb-src "$1" download_source "$1"
    fi
}

# What the tests of the series want, beside the one that is built.
get_sources() {
    lock_qemu
    get_source bookworm-backports
    get_source trixie
    unlock_qemu
}

# is_base FILE: it is the tarball that qemu-patches/BASE describes.
is_base() {
    [ -f "$1" ] && [ "$(sha256sum <"$1")" = "$(base sha256)  -" ]
}

# Sets qemu_tarball to the one that is built.
find_tarball() {
    local suite
    if [ -n "${QEMU_SOURCE:-}" ]; then
        [ -f "$QEMU_SOURCE" ] || die "QEMU_SOURCE: no file $QEMU_SOURCE"
        qemu_tarball=$(readlink -f "$QEMU_SOURCE")
        return
    fi
    suite=$(source_suite)
    get_source "$suite"
    qemu_tarball=$(echo "$qemu/download/$suite"/qemu_*.orig.tar.*)
    if [ "${qemu_tarball##*/}" = "$(base source)" ]; then
        is_base "$qemu_tarball" ||
            die "$qemu_tarball is not the one of qemu-patches/BASE"
    fi
}

# Sets qemu_tarball to the base of the series.
find_base() {
    local file
    for file in "${QEMU_SOURCE:-}" "$qemu"/download/*/qemu_*.orig.tar.* get; do
        if [ "$file" = get ]; then
            get_source bookworm-backports
            file=$(echo "$qemu"/download/bookworm-backports/qemu_*.orig.tar.*)
        fi
        if is_base "$file"; then
            qemu_tarball=$file
            return
        fi
    done
    die "$(base source), as qemu-patches/BASE has it, is not to be had here:" \
        "name it in QEMU_SOURCE"
}

# ----------------------------------------------------- packages that QEMU needs

# QEMU 10.0 wants meson 1.5; Debian 12 has that in backports alone.
need_meson() {
    local version
    version=$(dpkg-query -W -f '${db:Status-Status} ${Version}' meson \
              2>/dev/null) || version=
    if [ -z "$(missing meson python3-pycotap)" ] &&
            dpkg --compare-versions "${version#installed }" ge 1.5; then
        return
    fi
    if [ "$(codename)" = bookworm ]; then
        with_archive deb 'bookworm bookworm-backports' install_backports \
            meson python3-pycotap
    else
        need meson python3-pycotap
    fi
}

install_backports() {
    local dir=$1
    shift
    say "installing $*"
    apt_in "$dir" as_root env DEBIAN_FRONTEND=noninteractive apt-get install \
        -y --no-install-recommends -t bookworm-backports "$@" >&2
}

# ------------------------------------------------------------------ source tree

# git_in TREE ARGS...: with the files in $qemu/TREE, and an index of its own. The
# user's configuration and a repository around it have no say.
git_in() {
    local tree=$1
    shift
    (
        mkdir -p "$qemu/$tree"
        cd "$qemu/$tree"
        env GIT_DIR="$qemu/source.git" GIT_WORK_TREE="$qemu/$tree" \
            GIT_INDEX_FILE="$qemu/source.git/index-$tree" \
            GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
            GIT_AUTHOR_NAME=setup GIT_AUTHOR_EMAIL=setup \
            GIT_COMMITTER_NAME=setup GIT_COMMITTER_EMAIL=setup \
            git "$@"
    )
}

# unpack_base TARBALL: make source.git and source of it.
unpack_base() {
    local name stamp=$qemu/source.git/.setup-base want
    want=$(sha256sum <"$1"; declare -f unpack_base)
    if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        return
    fi
    say "unpacking ${1##*/}"
    rm -rf "$qemu"/{source,source.git,plain-source,each}
    mkdir -p "$qemu/source"
    # firmware's sources are of no use here
    tar -xf "$1" -C "$qemu/source" --strip-components=1 --no-same-owner \
        --exclude='*/roms'
    case $(cat "$qemu/source/VERSION" 2>/dev/null) in
        10.0.*) ;;
        *) die "$1 is not QEMU 10.0" ;;
    esac
    for name in "${qemu_stripped[@]}"; do
        name=$qemu/source/pc-bios/edk2-$name.fd.bz2
        if [ ! -e "$name" ]; then
            bzip2 </dev/null >"$name"
        fi
    done
    git_in source -c init.defaultBranch=base init -q
    git_in source config core.compression 0
    git_in source config gc.auto 0
    git_in source config advice.detachedHead false
    git_in source add -A -f
    git_in source commit -q -m "$(cat "$qemu/source/VERSION")"
    printf '%s\n' "$want" >"$stamp"
}

# Commit the patches one by one on top of base, as branch series: in the index
# alone, so that a checkout of it later touches no file that stays the same.
apply_series() {
    local patch tree commit
    commit=$(git_in series rev-parse refs/heads/base)
    git_in series read-tree "$commit"
    for patch in $(series); do
        quietly "$qemu/apply.log" git_in series apply --cached \
            --whitespace=nowarn "$qemu_patches/$patch"
        tree=$(git_in series write-tree)
        commit=$(git_in series commit-tree -p "$commit" -m "$patch" "$tree")
    done
    rmdir "$qemu/series"
    git_in source update-ref refs/heads/series "$commit"
}

# check_out TREE COMMIT
check_out() {
    if [ ! -e "$qemu/$1/VERSION" ]; then
        rm -f "$qemu/source.git/index-$1"
    fi
    git_in "$1" update-ref --no-deref HEAD "refs/heads/$2"
    git_in "$1" reset -q --hard "$2"
}

# ------------------------------------------------------------------------ build

core_sources() {
    sed -n '/^qcow2_lb_libcore_la_SOURCES/,/[^\\]$/ s/^\t\([^ ]*\).*/\1/p' \
        "$top/qcow2-lb/Makemodule.am"
    (cd "$top" && printf '%s\n' qcow2-lb/*.h qcow2-lb/libqcow2lb-core.*)
}

# The static library, so that the programs need none of ours when they run.
build_core() {
    local dir=$qemu/core
    lock
    configured "$dir" --disable-shared
    quietly "$dir/make.log" make -C "$dir" -j "$jobs" \
        INSTALL='/usr/bin/install -C' \
        lib_LTLIBRARIES=qcow2-lb/libqcow2lb-core.la \
        install-libLTLIBRARIES install-pkgconfigDATA install-qlbincludeHEADERS
    unlock
}

# build_tree PREFIX: $qemu/PREFIXsource in PREFIXbuild, and PREFIXstage.
build_tree() {
    local source=$qemu/$1source dir=$qemu/$1build stage=$qemu/$1stage want
    # configure splits it
    # shellcheck disable=SC2206
    local args=("${qemu_configure[@]}" ${QEMU_CONFIGURE:-})
    if grep -q "^option('livebackup'" "$source/meson_options.txt"; then
        args+=(--enable-livebackup)
    fi
    want="$dir ${args[*]}"
    if [ ! -e "$dir/.setup-configured" ] ||
            [ "$(cat "$dir/.setup-configured")" != "$want" ]; then
        say "configuring QEMU in ${dir#"$top"/}"
        rm -rf "$dir"
        mkdir -p "$dir"
        (cd "$dir" && quietly configure.log env \
            PKG_CONFIG_PATH="$qemu/core/stage/lib/pkgconfig" \
            "$source/configure" --prefix="$stage" "${args[@]}")
        printf '%s\n' "$want" >"$dir/.setup-configured"
    fi
    say "building QEMU in ${dir#"$top"/} (about three minutes if all is new)"
    (cd "$dir" && quietly ninja.log ninja "${qemu_targets[@]}")
    rm -rf "$stage.new"
    mkdir -p "$stage.new/bin"
    cp -p "${qemu_targets[@]/#/$dir/}" "$stage.new/bin"
    rm -rf "$stage"
    mv "$stage.new" "$stage"
}

lock_qemu() {
    mkdir -p "$qemu"
    touch "$qemu/.setup-configured"
    exec {qemu_lock}<"$qemu"
    flock "$qemu_lock"
}

unlock_qemu() {
    exec {qemu_lock}<&-
}

# made_from TARBALL: all that decides what is built.
made_from() {
    local file
    sha256sum <"$1"
    echo "$qemu ${QEMU_CONFIGURE:-}"
    cat "$top/qemu-patches/build.bash"
    cd "$top"
    # shellcheck disable=SC2046
    sha256sum $(core_sources)
    cd "$qemu_patches"
    echo series
    for file in $(series); do
        sha256sum "$file"
    done
}

# The patched QEMU, if the last one was built from something else.
build_qemu() {
    local now stamp=$qemu/.setup-built
    lock_qemu
    find_tarball
    now=$( (made_from "$qemu_tarball") | sha256sum)
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$now" ] ||
            [ ! -e "$qemu/stage/bin/qemu-system-x86_64" ]; then
        rm -f "$stamp"
        build_core
        unpack_base "$qemu_tarball"
        apply_series
        check_out source series
        build_tree ''
        printf '%s\n' "$now" >"$stamp"
    fi
    unlock_qemu
}

# The same QEMU without the series.
build_plain() {
    local stamp=$qemu/.setup-plain
    build_qemu
    lock_qemu
    local now
    now=$(cat "$qemu/source.git/.setup-base"; declare -p qemu_configure;
          echo "${QEMU_CONFIGURE:-}")
    if [ ! -e "$stamp" ] || [ "$(cat "$stamp")" != "$now" ] ||
            [ ! -e "$qemu/plain-stage/bin/qemu-system-x86_64" ]; then
        rm -f "$stamp"
        check_out plain-source base
        build_tree plain-
        printf '%s\n' "$now" >"$stamp"
    fi
    unlock_qemu
}

# --------------------------------------------------------------- stock packages

# unpack_stock SUITE VERSION: the distribution's QEMU in stock-VERSION, not
# installed: the machine may have another one.
unpack_stock() {
    local suite=$1 version=$2 dir=$qemu/stock-$2 libraries
    if [ ! -e "$dir/.setup-unpacked" ]; then
        with_archive deb "$suite" download_stock "$suite" "$version"
    fi
    mapfile -t libraries <"$dir/.setup-unpacked"
    need "${libraries[@]}"
}

download_stock() {
    local apt=$1 suite=$2 short=$3 new=$qemu/stock-$3.new version package
    version=$(apt_in "$apt" apt-cache show qemu-utils |
              awk '$1 == "Version:" { print $2 }' | newest_version "1:$short")
    [ -n "$version" ] || die "$suite has no packages of QEMU $short"
    say "getting the packages of qemu $version ($suite)"
    rm -rf "$new"
    mkdir -p "$new/debs" "$new/usr/share"
    (cd "$new/debs" && quietly ../apt.log apt_in "$apt" apt-get download \
        {qemu-utils,qemu-system-x86,qemu-system-common}="$version")
    for package in "$new"/debs/*.deb; do
        dpkg-deb -x "$package" "$new"
    done
    # the firmware's folders, relative to the programs
    rm -rf "$new/usr/share/qemu"
    ln -s /usr/share/qemu /usr/share/seabios "$new/usr/share"
    mkdir -p "$new/usr/lib/ipxe"
    ln -s /usr/lib/ipxe/qemu "$new/usr/lib/ipxe"
    for package in "$new"/debs/qemu-{utils,system-x86}_*.deb; do
        dpkg-deb -f "$package" Depends
    done | tr ',' '\n' | sed 's/^ *//; s/[ |(].*//' |
        grep -v -E '^(qemu.*|seabios|ipxe.*|)$' | sort -u >"$new/libraries"
    rm -rf "$new/debs"
    rm -rf "$qemu/stock-$short"
    mv "$new/libraries" "$new/.setup-unpacked"
    mv "$new" "$qemu/stock-$short"
}

# Debian 13 packages no QEMU 7.2.
have_stock_7() {
    [ "$(codename)" = bookworm ]
}

get_stock() {
    lock_qemu
    case $(codename) in
        bookworm)
            unpack_stock bookworm 7.2
            unpack_stock bookworm-backports 10.0
            ;;
        *)
            unpack_stock trixie 10.0
            ;;
    esac
    unlock_qemu
}

# ----------------------------------------------------------------- the commands

need_qemu() {
    need "${packages_build[@]}" "${packages_qemu[@]}"
    mkdir -p "$qemu"
    touch "$qemu/.setup-configured"
    need_meson
}

# What demo, check and so on do first. Without patches there is no QEMU of ours.
cmd_qemu() {
    have_series || die "$qemu_patches/series names no patch"
    trap give_back EXIT
    need_qemu
    build_qemu
}

# cmd_qemu_tree DIR: a git tree in which to work on the series.
cmd_qemu_tree() {
    local tree=$1 patch
    [ ! -e "$tree" ] || die "$tree exists already"
    need_qemu
    lock_qemu
    find_base
    unlock_qemu
    mkdir -p "$tree"
    tar -xf "$qemu_tarball" -C "$tree" --strip-components=1 --no-same-owner \
        --exclude='*/roms'
    git -C "$tree" -c init.defaultBranch=base init -q
    git -C "$tree" add -A -f
    git -C "$tree" commit -q -m "QEMU $(base version)"
    git -C "$tree" tag "$(base tag)"
    git -C "$tree" checkout -q -b series
    for patch in $(series); do
        git -C "$tree" am -q "$qemu_patches/$patch"
    done
    say "$tree has the series on top of $(base tag)"
}

# cmd_qemu_rebase TREE [TAG]: write the patches and the series anew.
cmd_qemu_rebase() (
    tree=$1
    tag=${2:-$(base tag)}
    new=$(mktemp -d "$qemu_patches/new.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    git -C "$tree" rev-parse -q --verify "$tag^{commit}" >/dev/null ||
        die "$tree has no $tag"
    GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 \
        git -C "$tree" -c core.abbrev=12 -c diff.noprefix=false \
        format-patch -q --zero-commit --no-signature -N -o "$new" "$tag..HEAD"
    (cd "$new" && find . -name '*.patch' | sed 's|^\./||' | LC_ALL=C sort) \
        >"$new/series"
    [ -s "$new/series" ] || die "$tree has nothing on top of $tag"
    for file in "$qemu_patches"/*.patch; do
        rm -f "$file"
    done
    mv "$new"/*.patch "$qemu_patches"
    {
        echo '# Written by ./setup qemu-rebase, as the patches are.'
        cat "$new/series"
    } >"$new/with-head"
    mv "$new/with-head" "$qemu_patches/series"
    say "$(series | wc -l) patches"
)

# ------------------------------------------------------------- upstream's tests

# Beside the group 'auto': all others that work with bitmaps, snapshots, block
# jobs and the formats' options.
iotests=(
    -g auto
    065 080 085 095 112 124 127 137 155 165 176 190 194 196 206 223 236 242
    244 245 246 249 250 254 256 257 258 260 261 264 267 271 273 274 280 281
    283 287 289 290 293 295 299 300 303
    image-fleecing copy-before-write graph-changes-while-io inactive-node-nbd
    migrate-bitmaps-test migrate-during-backup qcow2-encryption
    qcow2-internal-snapshots qemu-img-bitmaps qsd-migrate
    remove-bitmap-from-backing reopen-file backup-discard-source
)

# run_iotests PREFIX LOG ARGS...: TAP in LOG. The emulator is that of the stage:
# one in a build folder looks for its firmware there.
run_iotests() {
    local prefix=$1 log=$2
    shift 2
    local dir=$qemu/${prefix}build/tests/qemu-iotests
    rm -rf "$qemu/${prefix}iotests"
    (
        cd "$dir"
        env TMPDIR=/tmp TEST_DIR="$qemu/${prefix}iotests" \
            QEMU_PROG="$qemu/${prefix}stage/bin/qemu-system-x86_64" \
            ./check -tap -qcow2 "$@"
    ) >"$log" 2>&1 </dev/null || true
    if ! grep -q '^1\.\.' "$log"; then
        tail -n 20 "$log" >&2
        die "the runner of the iotests did not begin"
    fi
}

# results_of LOG: 'test result' for each, sorted.
results_of() {
    sed -n -E 's/^ok qcow2 ([^ ]+) # SKIP.*/\1 skip/p
               s/^ok qcow2 ([^ ]+)$/\1 pass/p
               s/^not ok qcow2 ([^ ]+).*/\1 FAIL/p' "$1" | LC_ALL=C sort
}

# The upstream tests with the series and without it. One that passes without it
# must pass with it, if need be on its own and at the second try: some depend on
# time, and with load fail without the series as well.
cmd_iotests() {
    local args=("$@") test again=() failed=0
    have_series || die "$qemu_patches/series names no patch"
    if [ "${#args[@]}" -eq 0 ]; then
        args=("${iotests[@]}")
    fi
    trap give_back EXIT
    need_qemu
    build_plain
    say "iotests without the series"
    run_iotests plain- "$qemu/iotests-without.log" -j "$jobs" "${args[@]}"
    say "iotests with the series"
    run_iotests '' "$qemu/iotests-with.log" -j "$jobs" "${args[@]}"
    LC_ALL=C join -a 1 -e none -o 0,1.2,2.2 \
        <(results_of "$qemu/iotests-without.log") \
        <(results_of "$qemu/iotests-with.log") >"$qemu/iotests-both"
    awk '{ count[$2 " without the series, " $3 " with it"]++ }
         END { for (what in count) print count[what], what }' \
        "$qemu/iotests-both" | sort -rn
    awk '$2 != $3 || $2 == "FAIL" { print "  " $0 }' "$qemu/iotests-both"
    mapfile -t again < <(awk '$2 == "pass" && $3 != "pass" { print $1 }' \
        "$qemu/iotests-both")
    for test in "${again[@]}"; do
        run_iotests '' "$qemu/iotests-$test.log" "$test"
        if grep -q "^ok qcow2 $test$" "$qemu/iotests-$test.log"; then
            say "$test passes at the second try"
        else
            failed=$((failed + 1))
            sed "s/^/    /" "$qemu/iotests-$test.log" | tail -n 60
        fi
    done
    say "$failed tests pass without the series alone"
    [ "$failed" -eq 0 ]
}
