/*
 * tailnode.h - a node of a tailnet inside a program that is not written in Go.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 *
 *     tailnode_options opt = TAILNODE_OPTIONS_INIT;
 *     tailnode_node    node;
 *     tailnode_error   err;
 *     int              ln, conn;
 *
 *     opt.hostname = "hello";
 *     opt.auth_key = getenv("TS_AUTHKEY");
 *     if (tailnode_new(&opt, &node, &err) || tailnode_up(node, 30000, &err) ||
 *         tailnode_listen(node, "tcp", ":80", 0, &ln, NULL, &err))
 *             die(err.message);
 *     while (tailnode_accept(ln, 0, &conn, NULL, NULL, &err) == 0)
 *             serve(conn);                        // read, write, shutdown, close: a socket
 *     close(ln);
 *     tailnode_close(node, NULL);
 *
 * THE TWO HALVES.  This library is a thin client without any Go in it. The node runs in a core, which is either
 * in this process (TAILNODE_IN_PROCESS: libtailnode-core is loaded when the first node is made) or in a helper
 * process (TAILNODE_ISOLATED: the library starts, watches and ends it). The calls, the file
 * descriptors and their behaviour are the same. No call of this header enters Go, in either mode: requests and
 * results are messages on sockets. docs/c-abi.md has the reasons and the figures.
 *
 * RESULTS.  Every function that can fail returns 0 or a tailnode_code, and fills the caller's tailnode_error if it
 * is given one (NULL is allowed). On failure the outputs are not touched, unless the function says otherwise.
 *
 * THREADS.  Every function may be called from any thread, also at the same time as another one on the same
 * handle, but for tailnode_error and tailnode_result structs, which belong to one call at a time. No function keeps a
 * pointer that it was given, but for the callbacks of tailnode_options. No function but fork's own handlers is
 * async-signal-safe.
 *
 * HANDLES.  tailnode_node and tailnode_op are passed by value. Their ids are never used again: a handle that is zero, made up,
 * of the other kind, or closed gives TAILNODE_INVALID_ARGUMENT or TAILNODE_CLOSED, never a crash.
 * Connections, listeners, UDP sockets and watches are file descriptors. They belong to the caller from the
 * moment a function returns them, and end with close(2).
 *
 * BLOCKING.  A function that waits takes timeout_ms: how long at most, in milliseconds; TAILNODE_FOREVER (-1)
 * sets no limit, 0 asks without waiting. tailnode_close from any thread ends all of the node's waiting calls with
 * TAILNODE_CLOSED. Each also exists as NAME_start, which returns at once with a tailnode_op: its descriptor (tailnode_op_fd)
 * polls readable when the result can be taken (tailnode_op_take), and tailnode_op_cancel gives it up. A NAME_start waits for nothing: not
 * for the network, the core, its start, or another thread's call. When the core has not yet taken the requests before (some hundreds), it
 * gives TAILNODE_EXHAUSTED with sys_errno EAGAIN, and has done nothing: call it again later.
 *
 * FORK.  In the child of a fork without exec every function returns TAILNODE_FORKED at once and does nothing; the parent is
 * not disturbed. A program that forks before its first tailnode_new, to become a daemon, goes on as if it had not, unless the core is linked
 * into it. fork and exec is always safe; every descriptor of the library is close-on-exec.
 *
 * SIGNALS.  The library installs no signal handler, blocks none and raises none, and none of its threads takes a signal of the host's, in
 * either mode; it never causes SIGPIPE. Writing with write(2) to a connection that is gone raises SIGPIPE as with every socket: use send(2) with
 * MSG_NOSIGNAL. A fault inside the core, in process, is a fault of the process, as with any library.
 */
#ifndef TAILNODE_H
#define TAILNODE_H

#include <stddef.h>
#include <stdint.h>

#define TAILNODE_VERSION_MAJOR 0
#define TAILNODE_VERSION_MINOR 1
#define TAILNODE_VERSION_PATCH 0
#define TAILNODE_VERSION_NUMBER (TAILNODE_VERSION_MAJOR * 10000 + TAILNODE_VERSION_MINOR * 100 + TAILNODE_VERSION_PATCH)

#if defined(__GNUC__) || defined(__clang__)
#define TAILNODE_API __attribute__((visibility("default")))
#else
#define TAILNODE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- errors --------------------------------------------------------------------------------------- */

/* The codes. The numbers never change and are never used again; new ones may come, so that a switch over them needs a
 * default. They are the same in Go and in Rust. */
typedef enum tailnode_code {
	TAILNODE_OK = 0,
	TAILNODE_INTERNAL = 1,            /* a fault in tailnode itself */
	TAILNODE_INVALID_ARGUMENT = 2,    /* an argument cannot be used; the message says which and why */
	TAILNODE_INVALID_STATE = 3,       /* the call does not fit the state */
	TAILNODE_CLOSED = 4,              /* the node, listener or operation is closed */
	TAILNODE_CANCELED = 5,            /* tailnode_op_cancel ended it */
	TAILNODE_TIMEOUT = 6,             /* timeout_ms passed; the message says what was missing */
	TAILNODE_AUTH_REFUSED = 7,        /* control refused the auth key or the node; the message is control's own */
	TAILNODE_NEEDS_LOGIN = 8,         /* reserved (somebody must visit the auth URL): see TAILNODE_TIMEOUT */
	TAILNODE_NEEDS_APPROVAL = 9,      /* reserved (an administrator must approve the machine) */
	TAILNODE_KEY_EXPIRED = 10,        /* this node's key, or the peer's, has expired */
	TAILNODE_CONTROL_UNREACHABLE = 11,/* reserved (no connection to the control server) */
	TAILNODE_CONTROL_PROTOCOL = 12,   /* reserved (what answered does not speak the control protocol correctly) */
	TAILNODE_STATE_CORRUPT = 13,      /* the state is torn or another program's; it was left as it is */
	TAILNODE_STATE_LOCKED = 14,       /* another process uses the state directory */
	TAILNODE_STATE_IO = 15,           /* the state could not be read or written */
	TAILNODE_NOT_TAILNET = 16,        /* the address or name is not on the tailnet */
	TAILNODE_NO_SUCH_HOST = 17,       /* no node of the tailnet has this name */
	TAILNODE_UNREACHABLE = 18,        /* no node of the tailnet has this address, or no way leads to it */
	TAILNODE_REFUSED = 19,            /* the peer refused the connection */
	TAILNODE_RESET = 20,              /* the peer reset the connection */
	TAILNODE_ADDRESS_IN_USE = 21,     /* something listens on that port already */
	TAILNODE_NOT_FOUND = 22,          /* no peer has the address that whois was asked for */
	TAILNODE_UNSUPPORTED = 23,        /* the network, the mode or the option is not offered */
	TAILNODE_EXHAUSTED = 24,          /* a limit of this node or of the process was reached; see sys_errno */
	TAILNODE_PENDING = 25,            /* nothing to take yet: poll the descriptor, then call again */
	TAILNODE_FORKED = 26,             /* this process is a fork of the one that has the node */
	TAILNODE_CORE_LOST = 27           /* the helper process that ran the node has ended */
} tailnode_code;

/* An error, in memory of the caller, who need not initialise it. A failing call fills it; a succeeding call sets code to 0 and
 * message to "". message ends with NUL, is UTF-8, holds no secret, and is cut if it does not fit. */
typedef struct tailnode_error {
	int32_t code;        /* a tailnode_code */
	int32_t sys_errno;   /* the errno behind it, or 0 */
	char    message[504];
} tailnode_error;

/* The name of a code, such as "auth refused"; "unknown" for a number that is none. Never NULL; static. */
TAILNODE_API const char *tailnode_code_name(int code);

/* ---- library -------------------------------------------------------------------------------------- */

/* The version of the library that runs, such as "0.1.0", and as TAILNODE_VERSION_NUMBER of its build. */
TAILNODE_API const char *tailnode_version(void);
TAILNODE_API uint32_t tailnode_version_number(void);

/* Frees memory that a function of this library allocated. NULL is allowed. */
TAILNODE_API void tailnode_free(void *p);

/* For programs that link the core in statically (libtailnode-core.a): call tailnode_use_core(tailnode_core_serve) before
 * the first tailnode_new. Otherwise the core is loaded with dlopen: $TAILNODE_CORE, then libtailnode-core.so.0 beside
 * this library, then on the loader's path. TAILNODE_INVALID_STATE once a core is in use. */
TAILNODE_API int tailnode_use_core(int (*serve)(int fd));
/* Exported by libtailnode-core only. It takes fd over and returns at once, 0 or an errno. */
extern int tailnode_core_serve(int fd);

/* ---- addresses ------------------------------------------------------------------------------------ */

/* An address with a port. family is 4 (the address is ip[0..3], the rest zero), 6, or 0: none. port is in host order. */
typedef struct tailnode_addr {
	uint8_t  ip[16];
	uint16_t port;
	uint8_t  family;
	uint8_t  reserved;
} tailnode_addr;

/* Writes "192.0.2.1:80", "[2001:db8::1]:80", or without port where it is 0, and NUL, into buf. TAILNODE_EXHAUSTED if it does
 * not fit; TAILNODE_ADDR_TEXT bytes always suffice. */
#define TAILNODE_ADDR_TEXT 56
TAILNODE_API int tailnode_addr_format(const tailnode_addr *addr, char *buf, size_t size);
/* The reverse: an IP address, alone or with a port. */
TAILNODE_API int tailnode_addr_parse(const char *text, tailnode_addr *out);

/* ---- nodes ---------------------------------------------------------------------------------------- */

typedef struct tailnode_node { uint64_t id; } tailnode_node;

#define TAILNODE_FOREVER ((int64_t)-1)

/* Where the node runs. */
#define TAILNODE_IN_PROCESS 0u /* in this process, by libtailnode-core */
#define TAILNODE_ISOLATED   1u /* in a helper process: no Go code, heap, thread or signal handler in this one */

/* tailnode_options.flags */
#define TAILNODE_EPHEMERAL    1u /* the node leaves the tailnet when it is closed or gone */
#define TAILNODE_STATE_MEMORY 2u /* keep the state in memory: the node is a new one in every process; dir is not used */
#define TAILNODE_RESTART      4u /* TAILNODE_ISOLATED: the next call after the helper died starts another, with the same identity */

/* Levels of log. */
#define TAILNODE_LOG_DEBUG (-4)
#define TAILNODE_LOG_INFO  0
#define TAILNODE_LOG_WARN  4
#define TAILNODE_LOG_ERROR 8

/* What a node is to be. Initialise with TAILNODE_OPTIONS_INIT; zero and NULL mean the default. tailnode_new copies it all: the
 * memory may go after it. A relative path is one from the working directory at that time. Fields may be added at the end; size tells the library which ones
 * the caller knows. */
typedef struct tailnode_options {
	size_t      size;          /* sizeof(tailnode_options) */
	uint32_t    mode;          /* TAILNODE_IN_PROCESS or TAILNODE_ISOLATED */
	uint32_t    flags;         /* TAILNODE_EPHEMERAL | ... */
	const char *dir;           /* the directory of the state, made if need be (0700) and locked; NULL: "tailnode-PROGRAM" in the user's configuration */
	const char *hostname;      /* the name to ask for; NULL: the program's */
	const char *auth_key;      /* NULL: $TS_AUTHKEY, $TS_AUTH_KEY, then interactive login */
	const char *control_url;   /* NULL: $TS_CONTROL_URL, then Tailscale's */
	const char *tags;          /* tags to ask for, separated by commas: "tag:web,tag:prod" */
	const char *root_ca_pem;   /* certificates that verify control and relays, as PEM text; NULL: the system's */
	const char *helper_path;   /* TAILNODE_ISOLATED: the helper program; NULL: $TAILNODE_HELPER, then tailnode-helper beside this library, then where it was installed */
	uint32_t    port;          /* UDP port for direct traffic; 0: the system chooses */

	/* Logs: records to log, else text lines to log_fd (> 0; the library keeps a duplicate; a line that would block is dropped). NULL and 0: silent. */
	int32_t     log_level;     /* the least level that is logged */
	int32_t     log_fd;
	/* Callbacks run on one thread of the library's own, one at a time, with all signals blocked; that thread exists only if one is
	 * set. A callback may call any function but tailnode_close of its own node. None runs after tailnode_close has returned. */
	void      (*log)(void *user, int level, const char *text, size_t len);
	void      (*auth_url)(void *user, const char *url);  /* somebody must visit url; once for each url */
	void       *user;          /* for the callbacks */

	/* The Go runtime of the core, see tailnode_set_*. In process they hold for all nodes of the process. */
	int64_t     memory_limit;  /* bytes; 0: leave it */
	int32_t     gc_percent;    /* 0: leave it; -1: only the memory limit triggers collections */
	int32_t     max_procs;     /* 0: leave it */
} tailnode_options;

#ifdef __cplusplus
#define TAILNODE_OPTIONS_INIT {sizeof(tailnode_options), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
#else
#define TAILNODE_OPTIONS_INIT {sizeof(tailnode_options), 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, 0, NULL, NULL, NULL, 0, 0, 0}
#endif

/* Makes a node and loads or starts its core. Waits for no network. The handle must be given to tailnode_close. */
TAILNODE_API int tailnode_new(const tailnode_options *opt, tailnode_node *out, tailnode_error *err);

/* Reads and locks the state and begins to connect, without waiting for the network. Optional: other calls do it. */
TAILNODE_API int tailnode_start(tailnode_node node, tailnode_error *err);

/* Starts the node if need be and waits until it is on the tailnet. Fails at once, with control's words, when control
 * refuses it. A time-out does not stop the node. */
TAILNODE_API int tailnode_up(tailnode_node node, int64_t timeout_ms, tailnode_error *err);

/* Takes the node off the tailnet, ends its waiting calls (TAILNODE_CLOSED), its listeners (end of file), its connections
 * (ECONNRESET) and its helper, and returns when nothing of it runs any more: at most three seconds for an
 * ephemeral node's farewell. It waits for no connection, whatever the host or the peer does: what was written and is still
 * on its way is lost, unless the host has shut its half down and read the peer's end of file before.
 * The handle is no longer valid, but for one case: TAILNODE_EXHAUSTED (no descriptor left to carry the request) closes
 * nothing, and the call can be made again. A second call gives TAILNODE_CLOSED. */
TAILNODE_API int tailnode_close(tailnode_node node, tailnode_error *err);

/* The status as JSON (the form of upstream's `status --json`), with all peers or without. *json is NUL-terminated, *len (may be
 * NULL) its length; free it with tailnode_free. */
TAILNODE_API int tailnode_status(tailnode_node node, int peers, char **json, size_t *len, tailnode_error *err);

/* The node's addresses, without port; family 0 before it has any. Either may be NULL. */
TAILNODE_API int tailnode_addresses(tailnode_node node, tailnode_addr *ip4, tailnode_addr *ip6, tailnode_error *err);

/* Who has the address, an IP address alone or with a port, as JSON: Node, UserProfile, CapMap. */
TAILNODE_API int tailnode_whois(tailnode_node node, const char *addr, int64_t timeout_ms, char **json, size_t *len, tailnode_error *err);

/* Pings the node that has the IP address and waits for the answer. type: "disco", "TSMP" or "ICMP". The answer is JSON: LatencySeconds, Endpoint,
 * DERPRegionID, ... */
TAILNODE_API int tailnode_ping(tailnode_node node, const char *ip, const char *type, int64_t timeout_ms, char **json, size_t *len, tailnode_error *err);

/* ---- connections ---------------------------------------------------------------------------------- */

/* Flags of dial, listen and accept. Every descriptor is close-on-exec in any case. */
#define TAILNODE_NONBLOCK 1u /* O_NONBLOCK; with tailnode_listen also on every connection that is accepted */

/* Connects to host:port on the tailnet, network "tcp", "tcp4", "tcp6", "udp", "udp4" or "udp6"; host is an address or a MagicDNS name, full or
 * short. Never leaves the tailnet. The result is a connected AF_UNIX stream socket for tcp:
 *   read, write, send, recv, sendmsg, poll, epoll, shutdown and close work as on a TCP socket;
 *   shutdown(SHUT_WR) sends a FIN, and reading goes on; the peer's FIN reads as end of file, and writing goes on;
 *   a reset, a time-out of TCP, the end of the node and the death of the helper all read as ECONNRESET, never as end of file,
 *   after the data that came before; writing then gives EPIPE;
 *   close with unread data resets the connection; SO_LINGER, TCP_NODELAY and urgent data do not exist.
 * For udp it is a connected SOCK_SEQPACKET socket: each send is one datagram, each recv one. An empty datagram can be sent and received;
 * poll tells it from the end (POLLHUP). */
TAILNODE_API int tailnode_dial(tailnode_node node, const char *network, const char *address, uint32_t flags, int64_t timeout_ms, int *fd,
                               tailnode_addr *local, tailnode_addr *remote, tailnode_error *err);

/* Listens on an address such as ":80", network "tcp", "tcp4" or "tcp6"; port 0 chooses one, which bound (may be NULL) tells. The result polls readable
 * when tailnode_accept has a connection; close(2) ends it, and with it the connections that were not accepted: as by close(2) of each, so that the peer reads
 * end of file, or a reset where it had sent something. */
TAILNODE_API int tailnode_listen(tailnode_node node, const char *network, const char *address, uint32_t flags, int *fd, tailnode_addr *bound, tailnode_error *err);

/* Takes the next connection of a listener, with the addresses of both ends (each may be NULL). It is one recvmsg(2) on listener:
 * it blocks if the listener does, else gives TAILNODE_PENDING; TAILNODE_CLOSED when the node or the listener has ended. Close-on-exec always;
 * flags: TAILNODE_NONBLOCK. A program may call recvmsg itself: the message is a tailnode_accepted with one descriptor in
 * SCM_RIGHTS. Any number of threads may accept from one listener. */
TAILNODE_API int tailnode_accept(int listener, uint32_t flags, int *fd, tailnode_addr *remote, tailnode_addr *local, tailnode_error *err);

typedef struct tailnode_accepted {
	uint32_t      magic; /* TAILNODE_ACCEPTED_MAGIC */
	tailnode_addr remote;
	tailnode_addr local;
} tailnode_accepted;
#define TAILNODE_ACCEPTED_MAGIC 0x544e4131u

/* A UDP socket on an address such as ":53", network "udp", "udp4" or "udp6". The result is a SOCK_SEQPACKET socket on which each message is a
 * tailnode_addr (the peer's) followed by the datagram, both ways: recvmsg and sendmsg with two iovecs, or the helpers below, which need
 * no call into the core. A datagram that does not fit in the socket's queue is dropped, as UDP does. */
TAILNODE_API int tailnode_listen_packet(tailnode_node node, const char *network, const char *address, uint32_t flags, int *fd, tailnode_addr *bound, tailnode_error *err);

/* One datagram from or to a socket of tailnode_listen_packet. *n is its length; what does not fit in buf is cut. TAILNODE_PENDING where a non-blocking
 * socket would block. */
TAILNODE_API int tailnode_recvfrom(int fd, void *buf, size_t size, size_t *n, tailnode_addr *from, tailnode_error *err);
TAILNODE_API int tailnode_sendto(int fd, const void *buf, size_t len, const tailnode_addr *to, tailnode_error *err);

/* ---- watching ------------------------------------------------------------------------------------- */

/* What an event is about. */
#define TAILNODE_EVENT_STATE    1u /* state has the new state, text what is wrong, if anything; the first event of every watch */
#define TAILNODE_EVENT_NETMAP   2u /* peers, names or addresses changed: read tailnode_status for them */
#define TAILNODE_EVENT_AUTH_URL 3u /* somebody must visit text */

#define TAILNODE_STATE_STOPPED        0u
#define TAILNODE_STATE_STARTING       1u
#define TAILNODE_STATE_NEEDS_LOGIN    2u
#define TAILNODE_STATE_NEEDS_APPROVAL 3u
#define TAILNODE_STATE_RUNNING        4u

typedef struct tailnode_event {
	uint32_t kind;
	uint32_t state;      /* the state at that time, with every kind */
	uint32_t text_len;
	uint32_t reserved;
	char     text[1008]; /* NUL-terminated when read by tailnode_read_event */
} tailnode_event;

/* A descriptor that polls readable when the node's state or netmap has changed. Each message is one tailnode_event (its first 16 bytes, then text_len
 * bytes of text); a reader that is slow misses intermediate states, never the last. It starts the node if need be. End of file: the node is closed. */
TAILNODE_API int tailnode_watch(tailnode_node node, uint32_t flags, int *fd, tailnode_error *err);
/* Takes the next event: TAILNODE_PENDING if there is none and fd does not block; TAILNODE_CLOSED at the end; TAILNODE_CORE_LOST if the helper died. */
TAILNODE_API int tailnode_read_event(int fd, tailnode_event *out, tailnode_error *err);

/* ---- loopback ------------------------------------------------------------------------------------- */

typedef struct tailnode_loopback_info {
	size_t size;                 /* sizeof(tailnode_loopback_info), set by the caller */
	char   address[64];          /* "127.0.0.1:PORT" */
	char   proxy_credential[64]; /* password of SOCKS5, user "tsnet" */
	char   local_api_credential[64]; /* password of HTTP basic auth for /localapi/, with the header "Sec-Tailscale: localapi" */
} tailnode_loopback_info;

/* Serves, on a TCP port of the loopback interface, SOCKS5 into the tailnet and the LocalAPI's status, whois and ping. The same answer every time. */
TAILNODE_API int tailnode_loopback(tailnode_node node, tailnode_loopback_info *out, tailnode_error *err);

/* ---- operations ----------------------------------------------------------------------------------- */

/* A call that is under way. It belongs to the caller until tailnode_op_take returned anything but TAILNODE_PENDING, or tailnode_op_cancel. */
typedef struct tailnode_op { uint64_t id; } tailnode_op;

/* What came of it. Initialise size; fields may be added. What the operation does not give is zero, fd -1. */
typedef struct tailnode_result {
	size_t        size;      /* sizeof(tailnode_result), set by the caller */
	char         *data;      /* JSON of status, whois, ping; the struct of loopback (tailnode_loopback_info) and runtime_stats
	                            (tailnode_stats), whose size field says how much of it the core filled; free with tailnode_free */
	size_t        data_len;
	int32_t       fd;        /* of dial, listen, listen_packet, watch */
	tailnode_addr local;     /* bound address; addresses: IPv4 */
	tailnode_addr remote;    /* dial: the peer's; addresses: IPv6 */
} tailnode_result;

/* The operation's descriptor, for poll and epoll: readable (POLLIN or POLLHUP) when there may be something to take. It is the library's: do
 * not read, write or close it. -1 for a handle that is not valid. */
TAILNODE_API int tailnode_op_fd(tailnode_op op);
/* Takes the result without blocking. TAILNODE_PENDING: not yet. Else the operation is over, its handle no longer valid, and
 * the return value is that of the call that it stands for. out may be NULL: then a descriptor in the result is closed. */
TAILNODE_API int tailnode_op_take(tailnode_op op, tailnode_result *out, tailnode_error *err);
/* Waits for the result like the blocking call would, at most timeout_ms; TAILNODE_PENDING after that, and the operation goes on. */
TAILNODE_API int tailnode_op_wait(tailnode_op op, int64_t timeout_ms, tailnode_result *out, tailnode_error *err);
/* Gives the operation up, at once: what it was doing is cancelled, what it may still yield is closed. A thread that waits in tailnode_op_wait
 * gets TAILNODE_CANCELED. An operation that is over gives TAILNODE_CLOSED. */
TAILNODE_API int tailnode_op_cancel(tailnode_op op);

/* tailnode_new without waiting for the core to be loaded or started. *node may be used at once, and must be given to tailnode_close whatever becomes of the
 * operation, which succeeds when the core has the node and fails with the code that tailnode_new would. Where the core is not
 * there yet, a thread that lives for that time starts it. */
TAILNODE_API int tailnode_new_start(const tailnode_options *opt, tailnode_node *node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_start_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_up_start(tailnode_node node, int64_t timeout_ms, tailnode_op *op, tailnode_error *err);
/* From the moment of this call the node's handle is no longer valid, unless it gives TAILNODE_EXHAUSTED. */
TAILNODE_API int tailnode_close_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_status_start(tailnode_node node, int peers, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_addresses_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_whois_start(tailnode_node node, const char *addr, int64_t timeout_ms, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_ping_start(tailnode_node node, const char *ip, const char *type, int64_t timeout_ms, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_dial_start(tailnode_node node, const char *network, const char *address, uint32_t flags, int64_t timeout_ms, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_listen_start(tailnode_node node, const char *network, const char *address, uint32_t flags, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_listen_packet_start(tailnode_node node, const char *network, const char *address, uint32_t flags, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_watch_start(tailnode_node node, uint32_t flags, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_loopback_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_runtime_stats_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_set_memory_limit_start(tailnode_node node, int64_t bytes, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_set_max_procs_start(tailnode_node node, int32_t n, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_set_gc_percent_start(tailnode_node node, int32_t percent, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_trim_start(tailnode_node node, tailnode_op *op, tailnode_error *err);
TAILNODE_API int tailnode_memory_pressure_start(tailnode_node node, int level, tailnode_op *op, tailnode_error *err);

/* ---- the runtime of the core ---------------------------------------------------------------------- */

/* What the Go runtime that runs the node uses: this process's one core, or the node's helper. Set size; fields may be added. */
typedef struct tailnode_stats {
	size_t   size;            /* sizeof(tailnode_stats), set by the caller */
	uint64_t heap_live;       /* bytes in live objects and in garbage not yet swept */
	uint64_t heap_idle;       /* bytes held for the heap and not in use */
	uint64_t heap_returned;   /* bytes of address space given back to the system */
	uint64_t stacks;          /* bytes of goroutine stacks */
	uint64_t other;           /* bytes of the runtime's own structures */
	uint64_t total;           /* bytes that the runtime has from the system now */
	uint64_t memory_limit;    /* bytes; INT64_MAX: none */
	uint64_t gc_cycles;
	uint64_t gc_pause_total_ns;
	uint64_t gc_pause_max_ns; /* longest, upper bound of its histogram bucket */
	uint64_t gc_cpu_ns;       /* CPU time of the collector */
	uint64_t threads;         /* OS threads that the runtime has made and keeps */
	uint64_t goroutines;
	uint64_t max_procs;
	uint64_t nodes;           /* open nodes of this core */
	uint64_t calls;           /* requests that this core has served */
	uint64_t calls_in_flight; /* requests without an answer yet */
	uint64_t connections;     /* stream descriptors open */
	uint64_t crossings;       /* calls from C into Go since the core was loaded: 1 in process, 0 isolated */
	int64_t  pid;             /* the process that runs the core */
} tailnode_stats;

TAILNODE_API int tailnode_runtime_stats(tailnode_node node, tailnode_stats *out, tailnode_error *err);

/* A soft limit, in bytes, on the memory of the core's runtime: nearing it, the collector works harder; INT64_MAX takes it away. */
TAILNODE_API int tailnode_set_memory_limit(tailnode_node node, int64_t bytes, tailnode_error *err);
/* How many threads may run Go code at a time, from 1. */
TAILNODE_API int tailnode_set_max_procs(tailnode_node node, int32_t n, tailnode_error *err);
/* How much the heap may grow, in percent of what is live, before the next collection (100 at first); -1: only the memory limit counts. */
TAILNODE_API int tailnode_set_gc_percent(tailnode_node node, int32_t percent, tailnode_error *err);
/* Collects, and gives all memory back to the system that is not in use. Returns when that is done (milliseconds). */
TAILNODE_API int tailnode_trim(tailnode_node node, tailnode_error *err);
/* The host tells how short memory is: 0 not at all, 1 some (collects), 2 very (also gives back, and lowers the limit to what is in
 * use plus an eighth, until level 0 puts it back). For a host's own accountant, or a watcher of memory.pressure. */
TAILNODE_API int tailnode_memory_pressure(tailnode_node node, int level, tailnode_error *err);

#ifdef __cplusplus
}
#endif
#endif
