// codes.c - prints the codes and their names, for comparison with testdata/vectors/codes.json.
#include "check.h"

int main(void) {
	for (int i = 1; strcmp(tailnode_code_name(i), "unknown"); i++)
		printf("%d %s\n", i, tailnode_code_name(i));
	return 0;
}
