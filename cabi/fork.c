// fork.c - the core's descriptors in a child of the host's fork. A Unix socket's end is felt at the other one when its last copy is closed: a child that lives on
// would keep resets and ends from the host. So the core's descriptors are noted here, in memory that needs no runtime, and the child closes them.
#include <pthread.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

// The Go half has the same (core/ends.go).
enum { WORDS = 1 << 15 }; // of 32 bits, one for each descriptor: those above a million are not noted
#define FORKING 0x40000000u

static struct {
	uint32_t users; // goroutines that are between a descriptor and its bit, and FORKING
	uint32_t top;   // words in use
	uint32_t bits[WORDS];
} ends;
static pthread_mutex_t forking = PTHREAD_MUTEX_INITIALIZER;

static void before(void) {
	pthread_mutex_lock(&forking);
	__atomic_or_fetch(&ends.users, FORKING, __ATOMIC_SEQ_CST);
	while (__atomic_load_n(&ends.users, __ATOMIC_SEQ_CST) != FORKING) // a few system calls long; and a thread of high priority must let them run
		nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
}

static void in_parent(void) {
	__atomic_and_fetch(&ends.users, ~FORKING, __ATOMIC_SEQ_CST);
	pthread_mutex_unlock(&forking);
}

static void in_child(void) {
	for (uint32_t w = 0; w < ends.top; w++) {
		for (uint32_t b = ends.bits[w]; b; b &= b - 1)
			close((int)(w * 32 + (uint32_t)__builtin_ctz(b)));
		ends.bits[w] = 0;
	}
	ends.users = 0;
	pthread_mutex_unlock(&forking);
}

// Called once, before there are any.
void *tailnode_core_ends(void) { return pthread_atfork(before, in_parent, in_child) ? NULL : &ends; }
