// Package matrix runs one set of checks over every combination of {our node, upstream's} as one peer,
// the same as the other, {our coordination server, upstream's} and {our relay, upstream's}. A cell
// of the matrix is the subtest node-a/node-b/control/relay.
package matrix
