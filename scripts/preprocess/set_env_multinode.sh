#!/usr/bin/env bash
# Gives each host of HOSTFILE (default: data/hosts/hostfile) its INDEX_CUSTOM, its place there, in the first line of its
# ~/.bashrc, for recipes that are started with LAUNCHER=hand on every node. A second run changes nothing. --remove takes
# the lines away. Without LAUNCHER=hand a recipe with HOSTFILE starts all nodes, before and after this script.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export HOSTFILE=${HOSTFILE:-data/hosts/hostfile}
case ${1:-} in
  "") remove= ;;
  --remove) remove=1 ;;
  *) echo "set_env_multinode.sh: unknown argument $1; choose --remove or none" >&2 && exit 2 ;;
esac
# The line names its machine, because nodes may share a home directory, and comes first, because many a .bashrc ends
# early in shells that aren't interactive.
{ echo "remove=$remove" && cat <<'NODE'; } | "$PYTHON_BIN" scripts/finetune/launch.py --each
name=$(hostname)
file=$HOME/.bashrc
line="case \$(hostname) in $name) export INDEX_CUSTOM=$1 ;; esac # set_env_multinode.sh"
touch "$file"
{
  [ -n "$remove" ] || echo "$line"
  grep -v "^case \$(hostname) in $name) .* # set_env_multinode.sh\$" "$file"
} > "$file.new"
cat "$file.new" > "$file" && rm "$file.new" && echo "$name: ${remove:+removed }INDEX_CUSTOM=$1"
NODE
