package netmon

import "syscall"

// scoped marks the default routes of interfaces other than the one that is used.
const scoped = syscall.RTF_IFSCOPE
