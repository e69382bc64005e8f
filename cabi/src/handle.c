// handle.c - errors, the fork flag, and the table behind the by-value handles.
#include <stdio.h>

#include "internal.h"

static const char *const code_names[] = {
    [0] = "ok", [TAILNODE_INTERNAL] = "internal", [TAILNODE_INVALID_ARGUMENT] = "invalid argument", [TAILNODE_INVALID_STATE] = "invalid state",
    [TAILNODE_CLOSED] = "closed", [TAILNODE_CANCELED] = "canceled", [TAILNODE_TIMEOUT] = "timeout", [TAILNODE_AUTH_REFUSED] = "auth refused",
    [TAILNODE_NEEDS_LOGIN] = "needs login", [TAILNODE_NEEDS_APPROVAL] = "needs approval", [TAILNODE_KEY_EXPIRED] = "key expired",
    [TAILNODE_CONTROL_UNREACHABLE] = "control unreachable", [TAILNODE_CONTROL_PROTOCOL] = "control protocol",
    [TAILNODE_STATE_CORRUPT] = "state corrupt", [TAILNODE_STATE_LOCKED] = "state locked", [TAILNODE_STATE_IO] = "state i/o",
    [TAILNODE_NOT_TAILNET] = "not on the tailnet", [TAILNODE_NO_SUCH_HOST] = "no such host", [TAILNODE_UNREACHABLE] = "unreachable",
    [TAILNODE_REFUSED] = "refused", [TAILNODE_RESET] = "reset", [TAILNODE_ADDRESS_IN_USE] = "address in use", [TAILNODE_NOT_FOUND] = "not found",
    [TAILNODE_UNSUPPORTED] = "unsupported", [TAILNODE_EXHAUSTED] = "exhausted", [TAILNODE_PENDING] = "pending", [TAILNODE_FORKED] = "forked",
    [TAILNODE_CORE_LOST] = "core lost",
};

const char *tailnode_code_name(int code) {
	if (code < 0 || code >= (int)(sizeof code_names / sizeof *code_names) || !code_names[code])
		return "unknown";
	return code_names[code];
}

#define STR2(x) #x
#define STR(x) STR2(x)
const char *tailnode_version(void) {
	return STR(TAILNODE_VERSION_MAJOR) "." STR(TAILNODE_VERSION_MINOR) "." STR(TAILNODE_VERSION_PATCH);
}
uint32_t tailnode_version_number(void) { return TAILNODE_VERSION_NUMBER; }

void tailnode_free(void *p) { free(p); }

void tn_set(tailnode_error *err, int code, int sys_errno, const char *text, size_t len) {
	if (!err)
		return;
	err->code = code;
	err->sys_errno = sys_errno;
	if (len >= sizeof err->message) {
		len = sizeof err->message - 1;
		while (len > 0 && ((unsigned char)text[len] & 0xc0) == 0x80) // not inside a character
			len--;
	}
	if (len)
		memcpy(err->message, text, len);
	err->message[len] = 0;
}

int tn_ok(tailnode_error *err) {
	tn_set(err, 0, 0, "", 0);
	return 0;
}

int tn_fail(tailnode_error *err, int code, int sys_errno, const char *format, ...) {
	if (err) {
		char buf[sizeof err->message];
		va_list ap;
		va_start(ap, format);
		int n = vsnprintf(buf, sizeof buf, format, ap);
		va_end(ap);
		tn_set(err, code, sys_errno, buf, n < 0 ? 0 : n < (int)sizeof buf ? (size_t)n : sizeof buf - 1);
	}
	return code;
}

// ---- fork ----

volatile int tn_forked, tn_used;

static void in_child(void) {
	tn_core_after_fork();
	if (tn_used || tn_core_linked()) { // else nothing was there to be torn apart: a daemon may fork first
		tn_forked = 1;
		tn_core_in_child();
	}
}

__attribute__((constructor)) static void at_load(void) { pthread_atfork(tn_core_before_fork, tn_core_after_fork, in_child); }

// ---- the table ----
// An id is a serial number and, in its low bits, a place in the table. The serial number is never used twice, so
// an id is not either, and a look-up needs no search.

#define PLACE_BITS 20
#define MAX_PLACES (1u << PLACE_BITS)

static struct {
	pthread_mutex_t mu;
	struct slot {
		uint64_t id;
		struct object_header *o; // NULL: free
		uint32_t next_free;
	} * slots;
	uint32_t len, cap, free; // free: place + 1, or 0
	uint64_t serial;
} table = {.mu = PTHREAD_MUTEX_INITIALIZER};

uint64_t tn_handle_add(struct object_header *o) {
	uint64_t id = 0;
	pthread_mutex_lock(&table.mu);
	uint32_t place;
	if (table.free) {
		place = table.free - 1;
		table.free = table.slots[place].next_free;
	} else {
		if (table.len == table.cap) {
			uint32_t cap = table.cap ? table.cap * 2 : 64;
			void *p = cap <= MAX_PLACES ? realloc(table.slots, cap * sizeof *table.slots) : NULL;
			if (!p)
				goto out;
			table.slots = p;
			table.cap = cap;
		}
		place = table.len++;
	}
	id = ++table.serial << PLACE_BITS | place;
	table.slots[place] = (struct slot){.id = id, .o = o};
	tn_ref(o);
out:
	pthread_mutex_unlock(&table.mu);
	return id;
}

// A handle that was given out once and is closed is told from one that never was by its serial number.
static struct slot *find(uint64_t id, enum object type, int *code) {
	uint32_t place = id & (MAX_PLACES - 1);
	uint64_t serial = id >> PLACE_BITS;
	if (!serial || serial > table.serial || place >= table.len) {
		*code = TAILNODE_INVALID_ARGUMENT;
		return NULL;
	}
	struct slot *s = &table.slots[place];
	if (!s->o || s->id != id) {
		*code = TAILNODE_CLOSED;
		return NULL;
	}
	if (s->o->type != type) {
		*code = TAILNODE_INVALID_ARGUMENT;
		return NULL;
	}
	return s;
}

void *tn_handle_get(uint64_t id, enum object type, int *code) {
	pthread_mutex_lock(&table.mu);
	struct slot *s = find(id, type, code);
	struct object_header *o = s ? s->o : NULL;
	if (o)
		tn_ref(o);
	pthread_mutex_unlock(&table.mu);
	return o;
}

void *tn_handle_remove(uint64_t id, enum object type, int *code) {
	pthread_mutex_lock(&table.mu);
	struct slot *s = find(id, type, code);
	struct object_header *o = s ? s->o : NULL;
	if (o) {
		s->o = NULL;
		s->next_free = table.free;
		table.free = (uint32_t)(id & (MAX_PLACES - 1)) + 1;
	}
	pthread_mutex_unlock(&table.mu);
	return o;
}

void tn_ref(void *o) { __atomic_add_fetch(&((struct object_header *)o)->refs, 1, __ATOMIC_RELAXED); }

void tn_unref(void *p) {
	struct object_header *o = p;
	if (o && __atomic_sub_fetch(&o->refs, 1, __ATOMIC_ACQ_REL) == 0)
		o->destroy(o);
}
