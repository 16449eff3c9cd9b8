/* Rows of double logits. */
#include <float.h>

#include "convert.h"
#include "exp_f64.h"

#define REAL double
#define KIND(name) name##_f64
#define OWN_DTYPE FLOAT64
#define LOWEST LOWEST_f64
#define LOWEST_FINITE (-DBL_MAX)
#define LOG1P_TERMS 16 /* the next is below an ulp */
#include "load.h"
#include "statistics.h"
#include "gradient.h"
#include "rows.h"
#include "elements.h"
#include "divergence.h"
