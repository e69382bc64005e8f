// dropin.c - a program written for libtailscale: its functions, and what its header says that they do.
#include "check.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netinet/in.h>

#include "tailscale.h"

static char text[600];
#undef OK
#define OK(sd, call)                                                           \
	do {                                                                   \
		int ok_ = (call);                                              \
		if (ok_) {                                                     \
			tailscale_errmsg(sd, text, sizeof text);               \
			FAIL("%s: %d: %s", #call, ok_, text);                  \
		}                                                              \
	} while (0)

static char states[] = "/tmp/tailnode-dropin-XXXXXX"; // of all nodes of this run, and of no other

static tailscale server(const char *hostname) {
	tailscale sd = tailscale_new();
	CHECK(sd > 0);
	char dir[sizeof states + 8];
	snprintf(dir, sizeof dir, "%s/XXXXXX", states);
	CHECK(mkdtemp(dir));
	OK(sd, tailscale_set_dir(sd, dir));
	OK(sd, tailscale_set_hostname(sd, hostname));
	OK(sd, tailscale_set_authkey(sd, getenv("TS_AUTHKEY")));
	OK(sd, tailscale_set_control_url(sd, getenv("TS_CONTROL_URL")));
	OK(sd, tailscale_set_ephemeral(sd, 1));
	OK(sd, tailscale_set_logfd(sd, -1));
	return sd;
}

static int threads(void) {
	int n = -2;
	DIR *d = opendir("/proc/self/task");
	while (d && readdir(d))
		n++;
	closedir(d);
	return n;
}

static int listener;
static char address[64];

static void *echo(void *p) { // one connection: the peer's address in front, then what comes, then end of file
	int c = *(int *)p;
	free(p);
	char from[64], b[4096];
	CHECK(tailscale_getremoteaddr(listener, c, from, sizeof from) == 0);
	ssize_t n;
	size_t all = 0;
	while ((n = read(c, b + all, sizeof b - all)) > 0)
		all += (size_t)n;
	CHECK(n == 0);
	write_all(c, from, strlen(from));
	write_all(c, b, all); // after the peer's half-close
	close(c);
	return NULL;
}

static void *serve(void *p) {
	(void)p;
	int c;
	while (tailscale_accept(listener, &c) == 0) {
		int *arg = malloc(sizeof *arg);
		*arg = c;
		pthread_t t;
		CHECK((fcntl(c, F_GETFD) & FD_CLOEXEC) && !pthread_create(&t, NULL, echo, arg) && !pthread_detach(t));
	}
	return NULL;
}

static void *pending_up(void *p) { return (void *)(intptr_t)tailscale_up(*(int *)p); }

// One request, and the answer's bytes to the end.
static ssize_t ask(const char *addr, const void *request, size_t len, char *out, size_t size) {
	struct sockaddr_in sa = {.sin_family = AF_INET};
	char ip[32];
	int port;
	CHECK(sscanf(addr, "%31[0-9.]:%d", ip, &port) == 2 && inet_pton(AF_INET, ip, &sa.sin_addr) == 1);
	sa.sin_port = htons((uint16_t)port);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(connect(fd, (struct sockaddr *)&sa, sizeof sa) == 0);
	write_all(fd, request, len);
	ssize_t all = 0, n;
	while ((n = read(fd, out + all, size - 1 - (size_t)all)) > 0)
		all += n;
	out[all] = 0;
	close(fd);
	return all;
}

static void base64(const char *in, char *out) {
	static const char set[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
	size_t len = strlen(in);
	for (size_t i = 0; i < len; i += 3) {
		unsigned v = (unsigned char)in[i] << 16 | (i + 1 < len ? (unsigned char)in[i + 1] << 8 : 0) | (i + 2 < len ? (unsigned char)in[i + 2] : 0);
		*out++ = set[v >> 18 & 63];
		*out++ = set[v >> 12 & 63];
		*out++ = i + 1 < len ? set[v >> 6 & 63] : '=';
		*out++ = i + 2 < len ? set[v & 63] : '=';
	}
	*out = 0;
}

static void loopback(tailscale sd) {
	char addr[64], proxy[33], local[33], small[4], request[500], auth[100], answer[1 << 16];
	OK(sd, tailscale_loopback(sd, addr, sizeof addr, proxy, local));
	CHECK(strlen(proxy) == 32 && strlen(local) == 32);
	CHECK(tailscale_loopback(sd, small, sizeof small, proxy, local) == ERANGE && !small[3]);
	CHECK(tailscale_loopback(sd, addr, sizeof addr, NULL, local) == -1);
	OK(sd, TsnetLoopback(sd, addr, sizeof addr, proxy, local));
	// The LocalAPI, in the form that bindings read.
	snprintf(request, sizeof request, ":%s", local);
	base64(request, auth);
	int n = snprintf(request, sizeof request, "GET /localapi/v0/status HTTP/1.0\r\nSec-Tailscale: localapi\r\nAuthorization: Basic %s\r\n\r\n", auth);
	ask(addr, request, (size_t)n, answer, sizeof answer);
	CHECK(strstr(answer, "\"BackendState\":\"Running\"") && strstr(answer, "\"TailscaleIPs\":[\"100.") && strstr(answer, "\"HostName\"") && strstr(answer, "\"Peer\""));
	n = snprintf(request, sizeof request, "GET /localapi/v0/status HTTP/1.0\r\nAuthorization: Basic %s\r\n\r\n", auth);
	ask(addr, request, (size_t)n, answer, sizeof answer);
	CHECK(strstr(answer, " 403 "));
	// SOCKS5 to "gopeer":20, which writes the caller's address.
	unsigned char socks[200] = {5, 1, 2};
	size_t k = 3;
	socks[k++] = 1; // the sub-negotiation, sent at once
	socks[k++] = 5;
	memcpy(socks + k, "tsnet", 5), k += 5;
	socks[k++] = 32;
	memcpy(socks + k, proxy, 32), k += 32;
	memcpy(socks + k, "\5\1\0\3\6gopeer\0\24", 13), k += 13;
	ssize_t got = ask(addr, socks, k, answer, sizeof answer);
	CHECK(got > 14 && !memcmp(answer, "\5\2\1\0\5\0", 6));
	CHECK(memmem(answer, (size_t)got, "100.", 4) || memmem(answer, (size_t)got, "[fd7a:", 6));
}

extern int tailnode_core_serve(int) __attribute__((weak)); // there in dropin_static

// A daemon forks before its first call, and goes on; with the core linked into it, it is told.
static void daemon_first(void) {
	pid_t pid = fork();
	int st;
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(60);
		tailscale sd = server("cdropd");
		if (tailnode_core_serve)
			CHECK(tailscale_up(sd) == -1 && tailscale_errmsg(sd, text, sizeof text) == 0 && strstr(text, "fork"));
		else
			OK(sd, tailscale_up(sd));
		CHECK(tailscale_close(sd) == 0);
		_exit(0);
	}
	CHECK(waitpid(pid, &st, 0) == pid && WIFEXITED(st) && WEXITSTATUS(st) == 0);
}

int main(void) {
	alarm(120);
	CHECK(mkdtemp(states));
	daemon_first();
	char b[200], small[5];
	int c, u;

	// Handles that are none, and buffers that are none.
	CHECK(tailscale_up(0) == EBADF && tailscale_start(-1) == EBADF && tailscale_close(77777) == EBADF && TsnetUp(1 << 30) == EBADF);
	CHECK(tailscale_errmsg(99, b, sizeof b) == EBADF && !*b);
	CHECK(tailscale_accept(-1, &c) == EBADF && tailscale_getremoteaddr(-1, -1, b, sizeof b) == EBADF);
	CHECK(tailscale_dial(5, "tcp", "x:1", &c) == EBADF && tailscale_getips(5, b, sizeof b) == EBADF);

	tailscale a = server("cdropa"), s = server("cdropb");
	CHECK(a != s);
	CHECK(tailscale_getips(a, b, sizeof b) == 0 && !*b);
	CHECK(tailscale_errmsg(a, b, sizeof b) == 0 && !*b);
	OK(a, tailscale_start(a));
	OK(a, tailscale_up(a));
	CHECK(tailscale_set_hostname(a, "late") == -1);
	CHECK(tailscale_errmsg(a, b, sizeof b) == 0 && strstr(b, "started"));
	CHECK(tailscale_errmsg(a, small, sizeof small) == ERANGE && strlen(small) == 4);
	CHECK(tailscale_errmsg(a, NULL, 0) == ERANGE && tailscale_errmsg(a, NULL, 10) != 0);
	CHECK(tailscale_getips(a, NULL, 10) == -1 && tailscale_getips(a, small, sizeof small) == ERANGE);
	char ips[100];
	OK(a, tailscale_getips(a, ips, sizeof ips));
	CHECK(!strncmp(ips, "100.", 4) && strstr(ips, ",fd7a:"));

	// The first listen starts a server.
	OK(s, tailscale_listen(s, "tcp", ":1999", &listener));
	CHECK(fcntl(listener, F_GETFD) & FD_CLOEXEC);
	CHECK(tailscale_listen(s, "tcp", ":1999", &c) == -1);
	CHECK(tailscale_errmsg(s, b, sizeof b) == 0 && *b);
	CHECK(tailscale_listen(s, NULL, NULL, &c) == -1 && tailscale_listen(s, "tcp", ":1", NULL) == -1);
	pthread_t t;
	CHECK(pthread_create(&t, NULL, serve, NULL) == 0);

	// Half-close, and the peer's address, every time: with both ends held by many descriptors at once.
	enum { MANY = 100 };
	static int conn[MANY];
	char *ip4 = strtok(strdup(ips), ",");
	snprintf(address, sizeof address, "cdropb:1999");
	OK(a, tailscale_dial(a, "tcp4", address, &conn[0]));
	int base = threads();
	for (int i = 1; i < MANY; i++)
		OK(a, (i % 2 ? TsnetDial(a, (char *)"tcp4", address, &conn[i]) : tailscale_dial(a, "tcp4", address, &conn[i])));
	CHECK(fcntl(conn[0], F_GETFD) & FD_CLOEXEC);
	CHECK(threads() <= base + MANY + MANY / 2); // the echo's own, and what the runtime may add; none of the library's for each
	for (int i = 0; i < MANY; i++) {
		char want[100], got[100] = "";
		int n = snprintf(want, sizeof want, "%squestion %d", ip4, i);
		write_all(conn[i], want + strlen(ip4), (size_t)n - strlen(ip4));
		CHECK(shutdown(conn[i], SHUT_WR) == 0);
		ssize_t k = 0, all = 0;
		while ((k = read(conn[i], got + all, sizeof got - 1 - (size_t)all)) > 0)
			all += k;
		if (strcmp(got, want))
			FAIL("connection %d gave \"%s\", want \"%s\"", i, got, want);
		close(conn[i]);
	}
	CHECK(tailscale_getremoteaddr(listener, listener, b, sizeof b) == EBADF);

	// A connection's address with a buffer that is too small, by a duplicate, and not for a descriptor that took its place.
	int l2, in, dup2_;
	OK(s, TsnetListen(s, (char *)"tcp", (char *)":2000", &l2));
	OK(a, tailscale_dial(a, "tcp4", "cdropb:2000", &c));
	struct pollfd p = {.fd = l2, .events = POLLIN};
	CHECK(poll(&p, 1, 30000) == 1);
	OK(s, TsnetAccept(l2, &in));
	CHECK(tailscale_getremoteaddr(l2, in, small, sizeof small) == ERANGE);
	CHECK(tailscale_getremoteaddr(l2, in, NULL, 5) == -1);
	dup2_ = dup(in);
	CHECK(TsnetGetRemoteAddr(l2, dup2_, b, sizeof b) == 0 && !strcmp(b, ip4));
	close(in);
	CHECK(dup2(open("/dev/null", O_RDONLY), in) == in);
	CHECK(tailscale_getremoteaddr(l2, in, b, sizeof b) == EBADF);
	close(in);
	close(dup2_);
	CHECK(read(c, b, 1) == 0);
	close(c);
	CHECK(fcntl(l2, F_SETFL, O_NONBLOCK) == 0 && tailscale_accept(l2, &c) == -1 && errno == EAGAIN);
	CHECK(tailscale_accept(listener, NULL) == -1);
	close(l2);
	CHECK(tailscale_accept(l2, &c) == EBADF);
	CHECK(close(l2) == -1 && errno == EBADF); // the kernel's

	// Datagrams keep their bounds.
	OK(a, tailscale_dial(a, "udp", "gopeer:7", &u));
	for (int seen = 0; seen != 3;) { // in any order (one by the relay, the next directly), and either may be lost
		CHECK(write(u, "one", 3) == 3 && write(u, "three", 5) == 5);
		struct pollfd w = {.fd = u, .events = POLLIN};
		if (poll(&w, 1, 1000) != 1)
			continue;
		ssize_t k = read(u, b, sizeof b);
		CHECK((k == 3 && !memcmp(b, "one", 3)) || (k == 5 && !memcmp(b, "three", 5)));
		seen |= k == 3 ? 1 : 2;
	}
	close(u);

	CHECK(tailscale_dial(a, "tcp", "gopeer:1", &c) == -1);
	CHECK(tailscale_errmsg(a, b, sizeof b) == 0 && strstr(b, "refused"));
	CHECK(tailscale_enable_funnel_to_localhost_plaintext_http1(a, 80) == -1);
	CHECK(TsnetErrmsg(a, b, sizeof b) == 0 && strstr(b, "Funnel"));
	loopback(a);

	// close ends an up that waits, and what waits in accept.
	tailscale w = server("cdropw");
	OK(w, tailscale_set_control_url(w, "http://127.0.0.1:1"));
	OK(w, tailscale_start(w));
	pthread_t t2;
	CHECK(pthread_create(&t2, NULL, pending_up, &w) == 0);
	OK(w, tailscale_close(w));
	void *res;
	pthread_join(t2, &res);
	CHECK((intptr_t)res == -1 || (intptr_t)res == EBADF);
	CHECK(tailscale_close(w) == EBADF);
	tailscale never = tailscale_new();
	CHECK(tailscale_close(never) == 0 && tailscale_up(never) == EBADF && tailscale_new() > never);

	// The log of a server, and no secret in it; a wrong key is said at once.
	FILE *log = tmpfile();
	w = server("cdroplog");
	OK(w, tailscale_set_authkey(w, "tskey-auth-wrong"));
	OK(w, tailscale_set_logfd(w, fileno(log)));
	CHECK(tailscale_set_logfd(w, 9999) == -1);
	CHECK(tailscale_up(w) == -1 && tailscale_errmsg(w, b, sizeof b) == 0 && *b && !strstr(b, "tskey"));
	OK(w, tailscale_close(w));
	rewind(log);
	static char lines[1 << 16];
	size_t n = fread(lines, 1, sizeof lines - 1, log);
	CHECK(n > 0 && !strstr(lines, "tskey-auth-wrong"));

	pid_t pid = fork();
	if (pid == 0) {
		alarm(60);
		CHECK(tailscale_new() == -1 && tailscale_up(a) == -1 && tailscale_accept(listener, &c) == -1 && tailscale_close(a) == -1);
		_exit(0);
	}
	int st;
	CHECK(waitpid(pid, &st, 0) == pid && st == 0);

	OK(s, TsnetClose(s));
	pthread_join(t, NULL); // accept ended
	close(listener);
	OK(a, tailscale_close(a));
	printf("dropin: ok\n");
	char rm[sizeof states + 8];
	snprintf(rm, sizeof rm, "rm -rf %s", states);
	return system(rm);
}
