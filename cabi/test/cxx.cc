// cxx.cc - the header from C++17.
#include "check.h"

#include <memory>
#include <string>

int main() {
	alarm(120);
	tailnode_node n = up("cxx");
	int fd = -1;
	OK(tailnode_dial(n, "tcp", "gopeer:20", TAILNODE_NONBLOCK, 30000, &fd, nullptr, nullptr, &err));
	std::string text;
	for (;;) {
		char b[64];
		wait_in(fd, 30000);
		ssize_t k = read(fd, b, sizeof b);
		CHECK(k >= 0);
		if (!k)
			break;
		text.append(b, static_cast<size_t>(k));
	}
	close(fd);
	tailnode_addr a;
	CHECK(tailnode_addr_parse(text.c_str(), &a) == 0 && a.family != 0);
	char *json = nullptr;
	OK(tailnode_status(n, 0, &json, nullptr, &err));
	std::unique_ptr<char, decltype(&tailnode_free)> owned(json, tailnode_free);
	CHECK(std::string(json).find("Running") != std::string::npos);
	OK(tailnode_close(n, &err));
	std::puts("cxx: ok");
}
