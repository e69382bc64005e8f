// internal.h - what the files of the thin client share. See docs/c-abi.md for the messages.
#ifndef TAILNODE_INTERNAL_H
#define TAILNODE_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "../include/tailnode.h"

#define HIDDEN __attribute__((visibility("hidden")))

// ---- messages: all numbers in the machine's own order, for both ends are on one machine ----

#define REQUEST_MAGIC 0x544e5131u
#define REPLY_MAGIC 0x544e5231u
#define MAX_STRINGS 8
#define MAX_REQUEST (128 << 10)
#define MAX_REPLY (256u << 20)

enum kind {
	K_NEW = 1, K_START, K_UP, K_CLOSE, K_STATUS, K_ADDRESSES, K_WHOIS, K_PING, K_DIAL, K_LISTEN,
	K_LISTEN_PACKET, K_WATCH, K_LOOPBACK, K_STATS, K_MEMORY_LIMIT, K_MAX_PROCS, K_GC_PERCENT, K_TRIM, K_PRESSURE,
};

struct request {
	uint32_t magic, kind;
	uint64_t node;
	int64_t timeout_ms;
	int64_t arg[8];
	uint32_t strings, reserved;
	uint32_t len[MAX_STRINGS];
};

struct reply {
	uint32_t magic;
	int32_t code, sys_errno;
	uint32_t data_len;
	tailnode_addr local, remote;
};

// ---- errors ----

HIDDEN int tn_fail(tailnode_error *err, int code, int sys_errno, const char *format, ...) __attribute__((format(printf, 4, 5)));
HIDDEN int tn_ok(tailnode_error *err);
HIDDEN void tn_set(tailnode_error *err, int code, int sys_errno, const char *text, size_t len);

// ---- fork ----

extern HIDDEN volatile int tn_forked;
extern HIDDEN volatile int tn_used; // a node was made, or tried to
#define CHECK_FORK(err)                                                                                            \
	do {                                                                                                       \
		if (tn_forked)                                                                                     \
			return tn_fail(err, TAILNODE_FORKED, 0, "tailnode: this process is a fork of the one that has the node"); \
	} while (0)

// ---- handles ----

enum object { O_NODE = 1, O_OP };

struct object_header {
	enum object type;
	int refs; // atomic
	void (*destroy)(void *);
};

HIDDEN uint64_t tn_handle_add(struct object_header *o); // takes a reference; 0: table full or no memory
HIDDEN void *tn_handle_get(uint64_t id, enum object type, int *code); // adds a reference
HIDDEN void *tn_handle_remove(uint64_t id, enum object type, int *code); // hands over the table's reference
HIDDEN void tn_ref(void *o);
HIDDEN void tn_unref(void *o);

// ---- cores ----

struct core {
	int refs; // atomic
	int fd;
	pid_t pid; // of the helper; 0 in process
};

HIDDEN int tn_core_in_process(struct core **out, tailnode_error *err);
// The helper program: the one that is asked for, or that is found; in buf, if need be.
HIDDEN const char *tn_helper_path(char buf[PATH_MAX], const char *path);
HIDDEN int tn_core_spawn(const char *path, struct core **out, tailnode_error *err);
HIDDEN void tn_core_unref(struct core *c);
HIDDEN void tn_core_before_fork(void);
HIDDEN void tn_core_after_fork(void);
HIDDEN void tn_core_in_child(void);
HIDDEN bool tn_core_linked(void); // the core is in this program from its start, and its runtime has threads
// Sends one message with up to two descriptors; they stay the caller's. Returns 0 or an errno; EAGAIN only if it may not wait.
HIDDEN int tn_core_send(struct core *c, const void *msg, size_t len, const int *fds, int nfds, bool wait);

// ---- nodes ----

struct node {
	struct object_header o;
	pthread_mutex_t attaching; // held while a core is loaded or started; taken before mu
	pthread_mutex_t mu;        // held briefly; guards core, callbacks, flags, closing, first to working
	struct core *core;
	bool closing;
	// Calls that may not wait, and need a core that is not there yet: a thread that exists as long as there are any sends them.
	struct deferred *first, **last;
	int deferred;
	bool working;
	uint64_t number; // its name on core's socket
	uint32_t mode, flags;
	// For the next core, NULL where there will be none; the auth key is in there.
	char *open_msg;
	size_t open_len;
	char *helper_path; // absolute; NULL in process
	int log_fd; // duplicate of the host's, or -1
	void (*log)(void *, int, const char *, size_t);
	void (*auth_url)(void *, const char *);
	void *user;
	struct callbacks *callbacks;
};

struct callbacks; // the thread that runs a node's callbacks
HIDDEN int tn_callbacks_start(struct node *n, int fd, struct callbacks *before, struct callbacks **out); // it takes before over, and waits for it
HIDDEN void tn_callbacks_join(struct callbacks *c); // waits, unless called on its thread
HIDDEN void tn_callbacks_release(struct callbacks *c); // lets it run out by itself
struct op;
HIDDEN bool tn_callbacks_closing(struct callbacks *c, struct op *op); // its thread will call tn_op_await_reply and tn_op_ready at its end; false: that has come
HIDDEN bool tn_callbacks_over(struct callbacks *c); // tn_callbacks_join will not wait
HIDDEN bool tn_callbacks_here(struct callbacks *c); // this is its thread

// ---- operations ----

struct op {
	struct object_header o;
	pthread_mutex_t mu; // guards what follows
	int fd;             // non-blocking; what the host polls
	int reply;          // where the result comes: fd, but for a node's close with callbacks, whose fd tells that both are there
	bool canceled, isolated, taken;
	bool wants_fd; // its result is a descriptor
	size_t prefix; // room in front of the data, for the size field of a struct
	struct reply head;
	size_t got; // bytes of head, then of data
	char *data;
	int passed; // descriptor of the reply, or -1
	struct callbacks *callbacks; // of a node that is being closed: its end is waited for with the result
};

struct args {
	enum kind kind;
	int64_t timeout_ms;
	int64_t arg[8];
	const char *str[MAX_STRINGS];
	int strings;
};

HIDDEN int tn_start_op(uint64_t node_id, const struct args *a, bool wait, struct op **out, tailnode_error *err);
HIDDEN int tn_start_op_on(struct node *n, const struct args *a, bool wait, struct op **out, tailnode_error *err);
HIDDEN int tn_op_await(struct op *op, int64_t timeout_ms, tailnode_result *out, tailnode_error *err);
HIDDEN int tn_call(uint64_t node_id, const struct args *a, tailnode_result *out, tailnode_error *err);
HIDDEN void tn_op_await_reply(struct op *op); // blocks until there is one, or the operation was cancelled
HIDDEN void tn_op_ready(struct op *op);       // makes fd readable, and gives up a reference
HIDDEN int tn_op_publish(struct op *op, tailnode_op *out, tailnode_error *err);
HIDDEN int tn_pack(char **out, size_t *len, uint64_t number, const struct args *a, tailnode_error *err);

// ---- small ----

HIDDEN ssize_t tn_recv_fd(int fd, void *buf, size_t len, int flags, int *passed);
HIDDEN int64_t tn_now_ms(void);
// A thread that takes none of the host's signals and is not waited for. Returns 0 or an errno.
HIDDEN int tn_detached(void *(*run)(void *), void *arg);

#endif
