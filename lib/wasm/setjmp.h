// Takes the place of <setjmp.h>, which WebAssembly lacks: an error leaves the module as a JavaScript
// exception, thrown by the import fail(). The code after setjmp() does not run; libllama2.c tidies up
// in the next call.
#ifndef LLAMA2_WASM_SETJMP_H
#define LLAMA2_WASM_SETJMP_H

typedef int jmp_buf[1];

__attribute__((import_module("llama2"), import_name("fail"))) _Noreturn void llama2_fail(void);

#define setjmp(caller) ((void)(caller), 0)
#define longjmp(caller, value) ((void)(caller), llama2_fail())

#endif
