#!/bin/sh
# Installs packages of Debian's that a test needs, if programs of theirs are missing:
#   sh tests/support/install_debian.sh 'PROGRAM ...' PACKAGE ...
# Nothing is started: while apt-get works, a policy forbids it unless the machine has a policy.
set -eu

for program in $1; do
	command -v "$program" >/dev/null || missing="$program"
done
[ -n "${missing-}" ] || exit 0
command -v apt-get >/dev/null || { echo "$missing is not installed: there is no apt-get here"; exit 0; }
if [ "$(id -u)" -ne 0 ]; then
	sudo -n true 2>/dev/null || { echo "$missing is not installed: only root may do that"; exit 0; }
	exec sudo -n sh "$0" "$@"
fi
shift

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	trap 'rm -f "$policy"' EXIT
	trap 'exit 1' HUP INT TERM
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
fi
echo "installing $*: a minute, once"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends "$@" >/dev/null
