/* Numbers that Python reads from the library, as it reads the sizes in the kernels' own files: each is said once. */

#include "native.h"

const int64_t dtype_float32 = FLOAT32;
const int64_t dtype_bfloat16 = BFLOAT16;
const int64_t dtype_float16 = FLOAT16;
