dnl QLB_CC_FLAG(VARIABLE, FLAG)
dnl Append FLAG to VARIABLE if the compiler takes it. Some warnings are GCC's
dnl alone; clang only refuses what it does not know when told to (-Werror).
AC_DEFUN([QLB_CC_FLAG], [
    qlb_saved_CFLAGS=$CFLAGS
    CFLAGS="$CFLAGS -Werror $2"
    AC_MSG_CHECKING([whether $CC accepts $2])
    AC_LINK_IFELSE([AC_LANG_PROGRAM([], [])],
        [AC_MSG_RESULT([yes]); $1="$$1 $2"],
        [AC_MSG_RESULT([no])])
    CFLAGS=$qlb_saved_CFLAGS
])
