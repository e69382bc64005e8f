// basic.c - join, listen, accept, dial, in the order of a first program.
#include "check.h"

int main(void) {
	alarm(120);
	tailnode_node a = up("calpha"), b = up("cbeta");

	int ln, conn, peer;
	tailnode_addr bound, remote, local, from, to;
	OK(tailnode_listen(b, "tcp", ":80", 0, &ln, &bound, &err));
	CHECK(bound.port == 80);
	OK(tailnode_dial(a, "tcp", "cbeta:80", 0, 30000, &conn, &from, &to, &err));
	OK(tailnode_accept(ln, 0, &peer, &remote, &local, &err));
	CHECK(!memcmp(&remote, &from, sizeof from));
	CHECK(local.port == 80 && to.port == 80);
	CHECK((fcntl(conn, F_GETFD) & FD_CLOEXEC) && (fcntl(peer, F_GETFD) & FD_CLOEXEC) && (fcntl(ln, F_GETFD) & FD_CLOEXEC));
	CHECK(!(fcntl(conn, F_GETFL) & O_NONBLOCK) && !(fcntl(peer, F_GETFL) & O_NONBLOCK));

	// Both ways, and half-close both ways.
	char buf[64];
	write_all(conn, "hello", 5);
	read_all(peer, buf, 5);
	CHECK(!memcmp(buf, "hello", 5));
	CHECK(shutdown(conn, SHUT_WR) == 0);
	CHECK(read(peer, buf, sizeof buf) == 0);
	write_all(peer, "after the end", 13);
	read_all(conn, buf, 13);
	close(peer);
	CHECK(read(conn, buf, sizeof buf) == 0);
	close(conn);
	close(ln);

	char text[TAILNODE_ADDR_TEXT], *json;
	size_t len;
	OK(tailnode_addr_format(&from, text, sizeof text));
	OK(tailnode_whois(b, text, 30000, &json, &len, &err));
	CHECK(strstr(json, "calpha") && strlen(json) == len);
	tailnode_free(json);
	OK(tailnode_status(a, 1, &json, &len, &err));
	CHECK(strstr(json, "\"BackendState\":\"Running\"") && strstr(json, "cbeta"));
	tailnode_free(json);

	OK(tailnode_close(a, &err));
	WANT(tailnode_close(a, &err), TAILNODE_CLOSED);
	WANT(tailnode_up(a, 0, &err), TAILNODE_CLOSED);
	OK(tailnode_close(b, &err));
	printf("basic: ok\n");
	return 0;
}
