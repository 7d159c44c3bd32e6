#!/bin/busybox sh
# The init of the machine in test_real_machine.py: says what firmware and kernel made of their TPM.
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t securityfs securityfs /sys/kernel/security
tpm=/sys/class/tpm/tpm0
say() { printf "\n=== %s\n" "$1"; cat "$2"; }

for name in caps owned active enabled temp_deactivated durations timeouts pubek; do say $name $tpm/$name; done
say firmware /sys/kernel/security/tpm0/ascii_bios_measurements
say ima /sys/kernel/security/ima/ascii_runtime_measurements

# A command of our own through /dev/tpm0: TPM_Extend of PCR 11.
{ printf '\000\301\000\000\000\042\000\000\000\024\000\000\000\013'; printf 'twenty bytes of data'; } > /extend
exec 3<> /dev/tpm0
cat /extend >&3
printf "\n=== extend\n"
head -c 30 <&3 | hexdump -v -e '/1 "%02x"'
echo
exec 3>&-
say pcrs $tpm/pcrs

# To memory and back: the kernel sends TPM_SaveState, the firmware TPM_Startup(ST_STATE). An alarm that
# comes before the machine sleeps would not wake it; to get there takes less than a second, as a rule.
echo deep > /sys/power/mem_sleep
echo +8 > /sys/class/rtc/rtc0/wakealarm
echo mem > /sys/power/state
printf "\n=== resumed\n%s\n" $?
say pcrs_afterwards $tpm/pcrs
printf "\n=== end\n"
poweroff -f
