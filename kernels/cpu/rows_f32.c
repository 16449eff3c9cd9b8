/* Rows of float, bfloat16 and float16 logits. */
#include <float.h>

#include "exp_f32.h"

#define REAL float
#define KIND(name) name##_f32
#define OWN_DTYPE FLOAT32
#define LOWEST LOWEST_f32
#define LOWEST_FINITE (-FLT_MAX)
#define LOG1P_TERMS 7 /* the next term is below an ulp */
#include "load.h"
#include "statistics.h"
#include "gradient.h"
#include "rows.h"
#include "elements.h"
