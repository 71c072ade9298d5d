"""How gkd is built: compilers (`toolchain`), kernels (`kernels`), pip's way in (`backend`), `make wheel` (`wheel`)."""
