#!/usr/bin/env bash
# Installs what is missing of the system's packages named as arguments, with apt. Where it may not, it prints the line
# to run and fails. A tool that is there already counts, wherever it came from.
set -euo pipefail

is_present() {
  case $1 in
    cmake) command -v cmake >/dev/null ;;
    g++) command -v c++ >/dev/null || command -v g++ >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    # Without dpkg nothing is known about the libraries; CMake then names the one that it does not find.
    *) ! command -v dpkg-query >/dev/null || [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]] ;;
  esac
}

missing=()
for package in "$@"; do
  is_present "$package" || missing+=("$package")
done
if [[ ${#missing[@]} -eq 0 ]]; then exit 0; fi

as_root=()
if [[ $(id -u) -ne 0 ]]; then as_root=(sudo -n); fi
if ! command -v apt-get >/dev/null || { [[ ${#as_root[@]} -gt 0 ]] && ! sudo -n true 2>/dev/null; }; then
  echo "These packages are missing and cannot be installed from here. Run this line, then try again:" >&2
  echo "  sudo apt-get install ${missing[*]}" >&2
  exit 1
fi

echo "Installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { "${as_root[@]}" apt-get update &&
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  echo "The packages could not be installed. By hand: sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
