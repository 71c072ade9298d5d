// Linked into kernels that are built for other machines than this one (GKD_BUILD_PORTABLE=1).

// glibc 2.32's hint that a lock is not worth taking, which libstdc++ reads and older ones lack. It says: take it.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
