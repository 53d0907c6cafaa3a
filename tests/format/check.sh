#!/usr/bin/env bash
# Checks the layout of every C++ file below the folder $1; with --fix after it, corrects it. Status 77: not checked.
set -euo pipefail
cd "$1"

if ! command -v clang-format-14 >/dev/null; then
  echo "skipped: clang-format-14 is not installed (package clang-format-14)"
  exit 77
fi

# --dry-run reports the closing comment of `namespace calm::inline CALM_ABI` though it would not change it: compare.
status=0
while IFS= read -r -d '' file; do
  if [[ "${2:-}" == --fix ]]; then
    clang-format-14 -i "$file"
  elif ! clang-format-14 "$file" | diff -u --label "$file" --label "$file (formatted)" "$file" -; then
    status=1
  fi
done < <(find include tests examples benchmarks -name '*.[ch]pp' -print0 | sort -z)
if [[ $status -ne 0 ]]; then echo "to correct this: tests/format/check.sh . --fix"; fi
exit "$status"
