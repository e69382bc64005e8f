//! Makes a node and closes it, without a network: the smallest proof that the library, and its core, are there.

use std::ffi::CStr;
use std::ptr::null_mut;

use tailnode_sys::*;

fn main() {
    use_linked_core();
    // Safety: zeroes are the options' defaults, and the strings outlive the call.
    unsafe {
        let mut options: tailnode_options = std::mem::zeroed();
        options.size = size_of::<tailnode_options>();
        options.flags = TAILNODE_STATE_MEMORY;
        options.control_url = c"http://127.0.0.1:9".as_ptr();
        let mut node = tailnode_node { id: 0 };
        let mut err = tailnode_error { code: 0, sys_errno: 0, message: [0; 504] };
        if tailnode_new(&options, &mut node, &mut err) != 0 {
            panic!("{}", CStr::from_ptr(err.message.as_ptr()).to_string_lossy());
        }
        assert_eq!(tailnode_close(node, null_mut()), 0);
        println!("libtailnode {} works", CStr::from_ptr(tailnode_version()).to_string_lossy());
    }
}
