#!/bin/sh
# Says what is missing before anything is installed: preflight.sh PYTHON CXX.
# Plain shell, because the first thing that may be missing is Python itself.

python=$1
cxx=${2%% *} # "ccache g++" names a program and its argument
missing=""
packages=""

need() { # what is missing, the package of Debian and Ubuntu that brings it
    missing="$missing  - $1
"
    case " $packages " in *" $2 "*) ;; *) packages="$packages $2" ;; esac
}

if ! command -v "$python" >/dev/null 2>&1; then
    need "Python 3.11 or newer: there is no command $python" python3
    need "the module venv that belongs to it" python3-venv
    need "the C headers that belong to it" python3-dev
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    version=$("$python" -c 'import platform; print(platform.python_version())')
    need "Python 3.11 or newer: $python is $version (another one: make PYTHON=python3.11 ...)" \
        python3.11
    need "the module venv that belongs to it" python3.11-venv
    need "the C headers that belong to it" python3.11-dev
else
    own=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        need "the module venv of $python" "$own-venv"
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    test -f "$headers/Python.h" ||
        need "the C headers of $python: no $headers/Python.h" "$own-dev"
fi
if ! command -v "$cxx" >/dev/null 2>&1; then
    need "a C++ compiler: there is no command $cxx (another one: make CC=clang CXX=clang++ ...)" g++
fi

if [ -n "$missing" ]; then
    {
        echo "gradsmith cannot be installed on this machine yet. What is missing:"
        printf '%s' "$missing"
        echo "On Debian or Ubuntu: sudo apt install$packages"
    } >&2
    exit 1
fi
