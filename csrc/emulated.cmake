# The CUDA kernels compiled for the CPU (tests/cpp), so that tests run them without a GPU and without
# nvcc. The library is installed among the tests and is never part of a wheel.
if(NOT DICEKERNELS_EMULATED)
  return()
endif()

# A source file has one language in a folder, and that of a .cu is CUDA: each is included by a .cpp.
set(sources csrc/cuda/ops.cpp)
function(dk_wrap kernel element)
  set(wrapper "${CMAKE_BINARY_DIR}/emulated/${element}/${kernel}.cpp")
  file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#define DK_ELEMENT ${element}\n#include \"${kernel}\"\n" @ONLY)
  set(sources ${sources} "${wrapper}" PARENT_SCOPE)
endfunction()
foreach(kernel IN LISTS DK_CUDA_KERNELS)
  dk_wrap(${kernel} "")
endforeach()
foreach(kernel IN LISTS DK_ELEMENT_KERNELS)
  foreach(element IN LISTS DK_ELEMENTS)
    dk_wrap(${kernel} ${element})
  endforeach()
endforeach()

find_package(Threads REQUIRED)
add_library(dicekernels_emulated MODULE ${sources})
target_compile_definitions(dicekernels_emulated PRIVATE DK_EMULATED)
target_include_directories(dicekernels_emulated PRIVATE "${CMAKE_SOURCE_DIR}/tests/cpp")
# Linked after dk_options, so that its flags come last: a kernel compiles for minutes with -O3. GCC does not
# see which branches of a template the plan excludes; shared memory full of NaN and the sanitizers do.
add_library(dk_emulated_options INTERFACE)
target_compile_options(dk_emulated_options INTERFACE -O2 -Wno-unknown-pragmas -Wno-maybe-uninitialized
  # Not -I: a header there may have the name of one of the system.
  "SHELL:-iquote ${CMAKE_SOURCE_DIR}/csrc/cuda")
target_link_libraries(dicekernels_emulated PRIVATE dk_options dk_emulated_options stdc++
  "${DICEKERNELS_TORCH_DIR}/lib/libtorch_cpu.so" Threads::Threads ${CMAKE_DL_LIBS})
if(DICEKERNELS_SANITIZE)
  # Undefined behaviour ends the test, as an address error does, instead of printing a line.
  set(sanitize -fsanitize=${DICEKERNELS_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g)
  target_compile_options(dicekernels_emulated PRIVATE ${sanitize})
  target_link_options(dicekernels_emulated PRIVATE ${sanitize})
else()
  target_link_options(dicekernels_emulated PRIVATE -Wl,-z,defs)
endif()
install(TARGETS dicekernels_emulated LIBRARY DESTINATION tests/cpp)
