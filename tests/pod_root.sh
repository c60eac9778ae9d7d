#!/bin/sh
# pod_root.sh ROOT MOUNTS HOSTS COMMAND…
#
# Runs a command as in a container: a read-only root with the system's programs, its own /etc/hosts,
# and the volumes of MOUNTS (lines: ro|rw SOURCE TARGET) at their paths. Start it in a new mount
# namespace (unshare --mount). The command replaces this process, so its process id is the same.
set -eu
root=$1 mounts=$2 hosts=$3
shift 3
mount -t tmpfs -o mode=0755 tmpfs "$root"
for each in /bin /sbin /lib /lib32 /lib64 /usr /dev /proc /sys; do
  if [ -L "$each" ]; then
    cp -P "$each" "$root$each"
  elif [ -d "$each" ]; then
    mkdir "$root$each"
    mount --rbind "$each" "$root$each"
    case $each in /dev | /proc | /sys) ;; *) mount -o remount,bind,ro "$root$each" ;; esac
  fi
done
cp -r /etc "$root/etc" 2>/dev/null || true  # Some of these files are not readable for every user.
cp "$hosts" "$root/etc/hosts"
mkdir "$root/tmp"
while read -r mode source target; do
  mkdir -p "$root$target"
  mount --bind "$source" "$root$target"
  [ "$mode" = rw ] || mount -o remount,bind,ro "$root$target"
done <"$mounts"
mount -o remount,bind,ro "$root"
chroot=$(PATH="$PATH:/usr/sbin:/sbin" command -v chroot)
exec "$chroot" "$root" "$@"
