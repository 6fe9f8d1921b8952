// Which table of kernels is in use.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace diffmtl::cpu {

// The instruction sets that this processor can run, the best one last.
std::vector<std::string> kernel_names();

// Uses the table of this name, or the best one; returns its name.
std::string select_kernels(const std::optional<std::string>& name);

}  // namespace diffmtl::cpu
