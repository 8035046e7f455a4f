// The Python functions of the CPU backend's operations; bind.cpp adds them to the module.
#pragma once

#include <pybind11/pybind11.h>

void bind_kernels(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
