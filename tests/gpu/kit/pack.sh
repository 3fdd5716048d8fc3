#!/usr/bin/env bash
# Pack a relocatable Python 3.10 with TensorRT 8.5.3 and what edgeseg needs beside it, in pieces, for a GPU machine without a
# network (x86-64, a glibc no older than here, an NVIDIA driver of 520 or later). unpack.sh puts it together there.
#
#   pack.sh OUTPUT_FOLDER [--python PYTHON3.10] [--project CHECKOUT] [--libraries none|all] [--wheel TENSORRT.whl]
#           [--piece-mib 50] [--compress xz|zstd] [--level N] [--with FOLDER]... [--keep-stage]
#
#   --python     a Python 3.10 in a prefix of its own, as pyenv builds it (default: python3.10 on the PATH)
#   --project    edgeseg's checkout (default: the current folder)
#   --libraries  none: TensorRT without cuDNN, cuBLAS and TensorRT's plugins, which are larger than TensorRT. TensorRT 8.5 asks
#                      for them by default: start programs with `bin/python -m no_external_tactics PROGRAM ARGUMENTS`, or build
#                      with --backend-option tactic_sources=JIT_CONVOLUTIONS,EDGE_MASK_CONVOLUTIONS.
#                all:  all that TensorRT's wheel asks for.
#   --wheel      TensorRT's wheel, when it is already here (default: from the package index)
#   --with       also pack this folder (engine folders), as extra/NAME; repeatable
#
# TensorRT, cuDNN and CUDA have licences of their own: what this writes is for your machines, not for publishing.
set -euo pipefail

python=python3.10 project=. libraries=none wheel= piece_mib=50 compress=xz level=9 keep=0 output= extras=()
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2; shift 2 ;;
    --project) project=$2; shift 2 ;;
    --libraries) libraries=$2; shift 2 ;;
    --wheel) wheel=$2; shift 2 ;;
    --piece-mib) piece_mib=$2; shift 2 ;;
    --compress) compress=$2; shift 2 ;;
    --level) level=$2; shift 2 ;;
    --with) extras+=("$2"); shift 2 ;;
    --keep-stage) keep=1; shift ;;
    -h|--help) sed -n '2,/^set -euo/{/^#/p}' "$0"; exit 0 ;;
    -*) echo "pack.sh: no option $1 (see --help)" >&2; exit 2 ;;
    *) output=$1; shift ;;
  esac
done
[ -n "$output" ] || { echo "pack.sh: name an output folder (see --help)" >&2; exit 2; }
case $libraries in none|all) ;; *) echo "pack.sh: --libraries is none or all" >&2; exit 2 ;; esac
case $compress in xz|zstd) command -v "$compress" >/dev/null || { echo "pack.sh: no $compress here" >&2; exit 2; } ;;
  *) echo "pack.sh: --compress is xz or zstd" >&2; exit 2 ;; esac
[ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = 3.10 ] || { echo "pack.sh: $python is not Python 3.10" >&2; exit 2; }
project=$(cd "$project" && pwd)
mkdir -p "$output"
output=$(cd "$output" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/edgeseg-pack.XXXXXX")
[ $keep = 1 ] || trap 'rm -rf "$work"' EXIT
stage=$work/edgeseg-trt85
mkdir -p "$stage/bin" "$stage/python/bin" "$stage/python/lib" "$stage/extra"
say() { echo "pack.sh: $*" >&2; }

# ---- Python
say "Python"
prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
cp "$prefix/bin/python3.10" "$stage/python/bin/"
for library in "$prefix"/lib/libpython3*.so*; do [ -e "$library" ] && cp -P "$library" "$stage/python/lib/"; done
tar -C "$prefix/lib" -c --exclude=__pycache__ --exclude='*.a' --exclude='python3.10/test' --exclude='python3.10/site-packages' \
    --exclude='python3.10/config-*' --exclude='python3.10/idlelib' --exclude='python3.10/tkinter' --exclude='python3.10/turtledemo' \
    --exclude='python3.10/ensurepip' --exclude='python3.10/lib2to3' --exclude='*/_test*.so' --exclude='*/_tkinter*.so' \
    --exclude='*/_xxtest*.so' --exclude='*/xxlimited*.so' --exclude='*/nis.*.so' --exclude='*/_dbm*.so' --exclude='*/_gdbm*.so' \
    --exclude='*/readline*.so' --exclude='*/_curses*.so' python3.10 | tar -C "$stage/python/lib" -x
site=$stage/python/lib/python3.10/site-packages
mkdir -p "$site"

# ---- packages: edgeseg's own, what its tests of a device need, the CUDA driver's Python package
say "packages"
"$python" -m venv "$work/pip"
"$work/pip/bin/pip" install --quiet --disable-pip-version-check --target "$site" --prefer-binary --no-compile \
    "$project[onnxruntime]" 'cuda-bindings==12.9.*' 'pytest>=8.3' 'pytest-timeout>=2.3'
rm -rf "$site/bin" "$site/edgeseg/demo"/*.safetensors
# Asked for by packages above, and used by tools of theirs that are of no use here.
rm -rf "$site"/sympy* "$site"/mpmath* "$site"/isympy.py "$site"/coloredlogs* "$site"/humanfriendly* "$site"/share \
    "$site"/onnx/backend/test "$site"/onnx/test "$site"/onnxruntime/transformers "$site"/onnxruntime/tools \
    "$site"/onnxruntime/datasets "$site"/setuptools* "$site"/pkg_resources "$site"/_distutils_hack "$site"/distutils-precedence.pth
find "$site" \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxd.in' -o -name '*.pyx.in' -o -name '*.h' -o -name '*.a' \) -delete
find "$site/numpy" -type d -name tests -not -path '*/_core/tests' -prune -exec rm -rf {} +
find "$site/numpy/_core/tests" -mindepth 1 -not -name '__init__.py' -not -name '_natype.py' -delete  # numpy.testing reads these

# ---- TensorRT
say "TensorRT, libraries: $libraries"
mkdir -p "$work/wheels"
fetch() { "$work/pip/bin/pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheels" "$@"; }
if [ -z "$wheel" ]; then
  fetch --implementation cp --python-version 3.10 --abi none --platform manylinux_2_17_x86_64 tensorrt==8.5.3.1
  wheel=$(echo "$work"/wheels/tensorrt-8.5.3.1-*.whl)
fi
"$python" - "$wheel" "$site" "$libraries" <<'PY'
import sys, zipfile
wheel, site, libraries = sys.argv[1:]
unwanted = {"libnvinfer_plugin.so.8"} if libraries == "none" else set()
with zipfile.ZipFile(wheel) as archive:
    for member in archive.namelist():
        if member.rpartition("/")[2] not in unwanted:
            archive.extract(member, site)
PY
take() {  # take WHEEL_PREFIX FILE...: libraries of a CUDA wheel, to where TensorRT's look for them (beside the package)
  "$python" - "$1" "$site" "${@:2}" <<'PY'
import fnmatch, glob, sys, zipfile
wheel, site, *patterns = sys.argv[1:]
(path,) = glob.glob(wheel)
with zipfile.ZipFile(path) as archive:
    for member in archive.namelist():
        if any(fnmatch.fnmatch(member.rpartition("/")[2], pattern) for pattern in patterns) or "dist-info/" in member:
            archive.extract(member, site)
PY
}
stand_in() {  # stand_in FOLDER SONAME C_SOURCE: a library that is there to be linked to
  mkdir -p "$1"
  printf '%s\n' "$3" >"$work/stand_in.c"
  printf '%s { global: *; };\n' "$2" >"$work/stand_in.map"
  cc -shared -fPIC -O1 -Wl,-soname,"$2" -Wl,--version-script,"$work/stand_in.map" -o "$1/$2" "$work/stand_in.c"
}
case $libraries in
  none)
    # The parser and the bindings are linked to the plugins for this one function; it says that there are none.
    stand_in "$site/tensorrt" libnvinfer_plugin.so.8 \
      '#include <stdbool.h>
       bool initLibNvInferPlugins(void *logger, const char *name_space) { (void)logger; (void)name_space; return true; }'
    ;;
  all)
    fetch nvidia-cudnn-cu11==8.6.0.163 nvidia-cublas-cu11==11.11.3.6 nvidia-cuda-nvrtc-cu11==11.8.89
    take "$work/wheels/nvidia_cudnn_cu11-*.whl" 'libcudnn.so.8' 'libcudnn_*.so.8'
    take "$work/wheels/nvidia_cublas_cu11-*.whl" libcublas.so.11 libcublasLt.so.11
    take "$work/wheels/nvidia_cuda_nvrtc_cu11-*.whl" 'libnvrtc*'
    ;;
esac
cp "$here/no_external_tactics.py" "$site/"

# ---- what the Python found on this machine and may not find on the other: kept aside, used only where it is missing
say "system libraries"
mkdir -p "$stage/python/lib-spare"
glibc='^(linux-vdso|ld-linux|libc|libm|libdl|libpthread|librt|libutil|libresolv|libnsl|libstdc\+\+|libgcc_s|libcuda)[.-]'
{ LD_LIBRARY_PATH=$stage/python/lib ldd "$stage"/python/lib/python3.10/lib-dynload/*.so "$stage/python/bin/python3.10" || true; } |
  awk '$2 == "=>" && $3 ~ /^\// {print $1, $3}' | sort -u | while read -r name path; do
    case $path in "$stage"/*) continue ;; esac
    [[ $name =~ $glibc ]] || cp -L "$path" "$stage/python/lib-spare/$name"
  done

# ---- how to start it, and what was given along
cat >"$stage/bin/python" <<'SH'
#!/bin/sh
# The Python in this folder, wherever the folder lies.
here=$(cd "$(dirname "$0")/.." && pwd -P)
LD_LIBRARY_PATH="$here/python/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export LD_LIBRARY_PATH
exec "$here/python/bin/python3.10" "$@"
SH
cat >"$stage/bin/edgeseg" <<'SH'
#!/bin/sh
exec "$(dirname "$0")/python" -m edgeseg "$@"
SH
chmod +x "$stage/bin/python" "$stage/bin/edgeseg"
for folder in ${extras[@]+"${extras[@]}"}; do cp -rL "$folder" "$stage/extra/"; done
echo "$libraries" >"$stage/libraries"
find "$stage" -name __pycache__ -prune -exec rm -rf {} +
say "unpacked: $(du -sm "$stage" | cut -f1) MiB"

# ---- one file, in pieces
say "compressing"
rm -f "$output"/edgeseg-trt85.tar.* "$output"/SHA256SUMS
# By suffix: libraries lie beside each other, so that the same kernels for several GPUs are found in one window.
(cd "$work" && find edgeseg-trt85 \( -type f -o -type l \) -print | awk '{n=split($0,p,/[.\/]/); print p[n] "\t" $0}' | sort -s -k1,1 | cut -f2-) >"$work/files"
case $compress in
  # A window that holds half of it: the same kernels for several GPUs lie far apart. Takes 2.1 GiB here, 0.2 GiB there.
  xz) compressor="xz --lzma2=preset=$level,dict=192MiB -T1" ;;
  zstd) compressor="zstd -$level --long=27 -T0 -q" ;;
esac
(cd "$work" && tar -c --owner=0 --group=0 --no-recursion -T files | nice -n 19 $compressor) |
  split -b "$((piece_mib << 20))" -d -a 3 - "$output/edgeseg-trt85.tar.$compress."
(cd "$output" && sha256sum edgeseg-trt85.tar."$compress".* >SHA256SUMS)
cp "$here/unpack.sh" "$output/" 2>/dev/null || say "unpack.sh is not beside pack.sh: take it along yourself"
say "pieces: $(cd "$output" && ls edgeseg-trt85.tar.* | wc -l), together $(du -cm "$output"/edgeseg-trt85.tar.* | tail -1 | cut -f1) MiB, in $output"
