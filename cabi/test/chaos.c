// chaos.c - everything, from many threads, with garbage, for a few seconds. What is asked is only that nothing crashes or hangs.
#include <stdint.h>

#include "check.h"

static tailnode_node live;
static uint64_t last_id;
static int64_t until;

static int64_t now_ms(void) {
	struct timespec ts;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static uint64_t rnd(uint64_t *s) {
	*s ^= *s << 13;
	*s ^= *s >> 7;
	return *s ^= *s << 17;
}

static const char *const words[] = {"", "tcp", "udp", "tcp4", "tcp6", "udp4", ":80", ":0", "gopeer:7", "gopeer:9", "cchaos:80", "192.0.2.1:1", "\xff\xfe\x01", "[::1]:x", "disco", "TSMP", "ICMP",
                                    "100.64.0.1", "100.64.0.2:7", "%s%n%p", "a.very.long.name.that.is.not.there:65536", NULL};
#define W words[rnd(&s) % (sizeof words / sizeof *words)]

static void use(int fd, uint64_t *s) {
	char b[100];
	switch (rnd(s) % 5) {
	case 0: (void)!send(fd, b, rnd(s) % sizeof b, MSG_NOSIGNAL | MSG_DONTWAIT); break;
	case 1: (void)!recv(fd, b, sizeof b, MSG_DONTWAIT); break;
	case 2: shutdown(fd, (int)(rnd(s) % 3)); break;
	}
	close(fd);
}

static void *run(void *p) {
	uint64_t s = (uint64_t)(uintptr_t)p * 0x9e3779b97f4a7c15u + 1;
	tailnode_error e;
	while (now_ms() < until) {
		tailnode_node n = live;
		switch (rnd(&s) % 6) {
		case 0: n.id = rnd(&s); break;
		case 1: n.id = __atomic_load_n(&last_id, __ATOMIC_RELAXED) - (rnd(&s) % 4 << 20); break;
		}
		int64_t t = (int64_t)(rnd(&s) % 20) - 1;
		t = t < 0 ? 5 : t;
		tailnode_op op = {rnd(&s)};
		tailnode_result r = {.size = sizeof r, .fd = -1};
		tailnode_addr a;
		char *json = NULL;
		int fd = -1;
		memset(&a, (int)rnd(&s), sizeof a);
		switch (rnd(&s) % 20) {
		case 0: if (!tailnode_dial(n, W, W, (uint32_t)(rnd(&s) % 3), t, &fd, NULL, NULL, &e)) use(fd, &s); break;
		case 1: if (!tailnode_listen(n, W, W, 1, &fd, &a, &e)) { int c; if (!tailnode_accept(fd, 1, &c, NULL, NULL, &e)) close(c); close(fd); } break;
		case 2: if (!tailnode_listen_packet(n, W, W, 1, &fd, NULL, NULL)) { size_t k; char b[50]; tailnode_sendto(fd, b, sizeof b, &a, &e); tailnode_recvfrom(fd, b, sizeof b, &k, &a, &e); close(fd); } break;
		case 3: if (!tailnode_status(n, 1, &json, NULL, &e)) tailnode_free(json); break;
		case 4: if (!tailnode_whois(n, W, t, &json, NULL, NULL)) tailnode_free(json); break;
		case 5: if (!tailnode_ping(n, W, W, t, &json, NULL, &e)) tailnode_free(json); break;
		case 6: tailnode_op_take(op, &r, &e); tailnode_op_cancel(op); tailnode_op_fd(op); break;
		case 7: if (!tailnode_dial_start(n, "tcp", W, 0, t, &op, &e)) { if (rnd(&s) % 2) tailnode_op_cancel(op); else if (!tailnode_op_wait(op, -1, &r, &e) && r.fd >= 0) use(r.fd, &s); } break;
		case 8: if (!tailnode_watch(n, 1, &fd, &e)) { tailnode_event ev; while (!tailnode_read_event(fd, &ev, &e)) ; close(fd); } break;
		case 9: { tailnode_stats st = {.size = rnd(&s) % 300}; tailnode_runtime_stats(n, &st, &e); break; }
		case 10: tailnode_up(n, t, &e); tailnode_start(n, NULL); tailnode_addresses(n, &a, NULL, &e); break;
		case 11: tailnode_accept((int)(rnd(&s) % 3), 0, &fd, NULL, NULL, &e); break;
		case 12: { char b[8]; size_t k; tailnode_recvfrom(-1, b, sizeof b, &k, &a, &e); tailnode_sendto(-1, b, sizeof b, &a, &e); tailnode_addr_format(&a, b, rnd(&s) % 9); break; }
		case 13: { const char *w = W; if (w) tailnode_addr_parse(w, &a); break; }
		case 14: { tailnode_loopback_info li = {.size = rnd(&s) % 2 ? sizeof li : rnd(&s) % 5000}; if (li.size <= sizeof li) tailnode_loopback(n, &li, &e); break; }
		case 15: tailnode_memory_pressure(n, (int)(rnd(&s) % 4), &e); break;
		case 16: { // a node of its own, that is closed by two threads' worth of calls
			tailnode_options o = options("cother");
			tailnode_node m;
			if (!tailnode_new(&o, &m, &e)) {
				__atomic_store_n(&last_id, m.id, __ATOMIC_RELAXED);
				tailnode_op up_op = {0};
				tailnode_up_start(m, 1000, &up_op, &e);
				tailnode_close(m, &e);
				tailnode_op_take(up_op, NULL, &e);
				tailnode_op_cancel(up_op);
			}
			break;
		}
		case 17: if (n.id != live.id) tailnode_close(n, &e); break;
		default: if (!tailnode_status_start(n, 0, &op, &e)) { struct pollfd pf = {.fd = tailnode_op_fd(op), .events = POLLIN}; poll(&pf, 1, 5); if (!tailnode_op_take(op, &r, &e)) tailnode_free(r.data); else tailnode_op_cancel(op); }
		}
	}
	return NULL;
}

int main(int argc, char **argv) {
	int seconds = argc > 1 ? atoi(argv[1]) : 5;
	alarm((unsigned)seconds + 120);
	int null = open("/dev/null", O_RDWR);
	dup2(null, 0); // accept and recvmsg on 0 to 2 must not find a terminal
	live = up("cchaos");
	until = now_ms() + seconds * 1000;
	pthread_t t[8];
	for (uintptr_t i = 0; i < 8; i++)
		CHECK(pthread_create(&t[i], NULL, run, (void *)(i + 1)) == 0);
	for (int i = 0; i < 8; i++)
		pthread_join(t[i], NULL);
	// It still works.
	int fd;
	OK(tailnode_dial(live, "tcp", "gopeer:7", 0, 30000, &fd, NULL, NULL, &err));
	char b[2];
	write_all(fd, "ok", 2);
	read_all(fd, b, 2);
	close(fd);
	OK(tailnode_close(live, &err));
	printf("chaos: ok\n");
	return 0;
}
