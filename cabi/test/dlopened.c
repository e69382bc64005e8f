// dlopened.c - the library loaded with dlopen, as language bindings do.
#include <dlfcn.h>

#include "check.h"

int main(int argc, char **argv) {
	CHECK(argc == 2);
	void *lib = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
	if (!lib)
		FAIL("%s", dlerror());
	int (*new_)(const tailnode_options *, tailnode_node *, tailnode_error *);
	int (*up_)(tailnode_node, int64_t, tailnode_error *);
	int (*close_)(tailnode_node, tailnode_error *);
	*(void **)&new_ = dlsym(lib, "tailnode_new");
	*(void **)&up_ = dlsym(lib, "tailnode_up");
	*(void **)&close_ = dlsym(lib, "tailnode_close");
	CHECK(new_ && up_ && close_);
	tailnode_options o = options("cdl");
	tailnode_node n;
	CHECK(new_(&o, &n, &err) == 0 && up_(n, 30000, &err) == 0 && close_(n, &err) == 0);
	dlclose(lib); // the client may go; a core in this process stays (nodelete)
	pid_t pid = fork(); // and its fork handler with it
	if (pid == 0)
		_exit(0);
	int st;
	CHECK(waitpid(pid, &st, 0) == pid && st == 0);
	printf("dlopened: ok\n");
	return 0;
}
